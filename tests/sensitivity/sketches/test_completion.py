"""What a table is made of is recovered exactly where it is a product, and the errors told are those that are made."""

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.candidates import Candidates
from sensitivity.profile import NATS, LossTable
from sensitivity.sketches.completion import complete
from sensitivity.sketches.pair_design import choose_pairs
from tests.sensitivity.listed_units import FORMATS, list_units, make_candidates, make_unit

ROLES = ("q_proj", "k_proj", "down_proj", "up_proj")
F = len(FORMATS)
Table = NDArray[np.float64]


def make_table(loss: Table, relative_error: float = 0.1) -> LossTable:
    return LossTable(loss=loss, std_error=relative_error * loss, unit_of_measure=NATS)


def make_reference(candidates: Candidates, seed: int = 0) -> Table:
    """Returns a table that falls fourfold a bit, at a level of each unit's own."""
    generator = np.random.default_rng(seed)
    level = generator.normal(-4, 1.5, (len(candidates.units), 1))
    bits = np.array([f.bits for f in candidates.formats])
    return np.asarray(np.exp(level - np.log(4) * bits))


def effects(candidates: Candidates, *, format_: float = 0.0, role: float = 0.0, unit: float = 0.0) -> Table:
    """Returns factors [U, F], products of effects of these deviations in the logarithm."""
    generator = np.random.default_rng(1)
    n_units, n_formats = candidates.allowed.shape
    by_format = generator.normal(0, format_, (1, n_formats))
    by_role = generator.normal(0, role, (len(ROLES), 1))[[ROLES.index(u.role) for u in candidates.units]]
    by_unit = generator.normal(0, unit, (n_units, 1))
    return np.asarray(np.exp(by_format + by_role + by_unit - 1.5))


def run(candidates: Candidates, loss: Table, reference: Table, passes: int, *others: Table) -> LossTable:
    lossy = candidates.allowed & (loss > 0)
    measured = choose_pairs(candidates.units, lossy, passes, seed=0)
    # What was not measured is not known.
    known = np.where(measured, loss, np.nan)
    return complete(make_table(known), measured, references=(reference, *others), candidates=candidates, lossy=lossy)


@pytest.fixture
def candidates() -> Candidates:
    return make_candidates(list_units(ROLES, 12))


@pytest.mark.parametrize(
    "deviations",
    [
        {},
        {"format_": 0.5},
        {"role": 0.5},
        {"unit": 0.5},
        {"format_": 0.5, "unit": 0.5},
        {"format_": 1.0, "role": 1.0, "unit": 1.0},
    ],
    ids=lambda deviations: "+".join(deviations) or "constant",
)
def test_product_of_reference_and_effects_is_recovered(candidates: Candidates, deviations: dict[str, float]) -> None:
    reference = make_reference(candidates)
    loss = reference * effects(candidates, **deviations)
    completed = run(candidates, loss, reference, 2 * len(loss) + 10)
    # Variances end at 1e4, so effects are shrunk by about 1e-4 of their size.
    np.testing.assert_allclose(completed.loss, loss, rtol=5e-3)
    assert completed.measured is not None
    relative = (completed.std_error / completed.loss)[~completed.measured]
    assert relative.max() < 0.02


def test_effect_that_only_another_reference_has_is_recovered(candidates: Candidates) -> None:
    near, far = make_reference(candidates, 0), make_reference(candidates, 5)
    loss = near * (far / near) ** 0.4
    completed = run(candidates, loss, near, len(loss), far)
    np.testing.assert_allclose(completed.loss, loss, rtol=5e-3)


def test_smooth_effect_of_depth_reaches_unmeasured_layers() -> None:
    candidates = make_candidates(list_units(ROLES, 32))
    depth = np.array([unit.layer_index or 0 for unit in candidates.units]) / 31
    reference = make_reference(candidates)
    loss = reference * np.exp(2.0 * np.cos(np.pi * depth))[:, None]
    completed = run(candidates, loss, reference, 64)
    assert completed.measured is not None
    unmeasured = ~completed.measured.any(axis=1)
    assert unmeasured.sum() == 64
    error = np.abs(np.log(completed.loss / loss))[unmeasured]
    # A line in place of the half wave would err by 0.2 on average, a constant by 1.3.
    assert error.mean() < 0.05


def test_measured_and_lossless_entries_stay_as_they_are(candidates: Candidates) -> None:
    loss = make_reference(candidates) * effects(candidates, unit=0.3)
    loss[:, -1] = 0.0
    candidates.allowed[3, :2] = False
    loss[3, :2] = 0.0
    lossy = loss > 0
    measured = choose_pairs(candidates.units, lossy, 100, seed=0)
    table = make_table(loss)
    reference = make_reference(candidates)
    completed = complete(table, measured, references=(reference,), candidates=candidates, lossy=lossy)
    np.testing.assert_array_equal(completed.loss[measured], loss[measured])
    np.testing.assert_array_equal(completed.std_error[measured], table.std_error[measured])
    assert not completed.loss[~lossy].any() and not completed.std_error[~lossy].any()
    np.testing.assert_array_equal(completed.measured, measured | (candidates.allowed & ~lossy))
    assert (completed.loss[lossy & ~measured] > 0).all() and (completed.std_error[lossy & ~measured] > 0).all()
    assert completed.unit_of_measure == NATS


@pytest.mark.parametrize("passes", [40, 96, 160], ids=["subset_of_units", "two_each", "more"])
def test_errors_are_those_that_are_told(passes: int) -> None:
    candidates = make_candidates(list_units(ROLES, 12))
    standardized = []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        reference = make_reference(candidates, seed)
        noise = generator.normal(0, 0.2, reference.shape) + generator.normal(0, 0.3, (len(reference), 1))
        loss = reference * np.exp(noise)
        completed = run(candidates, loss, reference, passes)
        assert completed.measured is not None
        relative = completed.std_error / completed.loss
        standardized.append((np.log(completed.loss / loss) / relative)[~completed.measured])
    spread = np.sqrt(np.mean(np.square(np.concatenate(standardized))))
    # One for the right error. A table's is known to 10 % from its 48 units, that of twenty to 3 %; the rest is for
    # variances chosen and the spread estimated on the same pairs, of which there are 40 at the least.
    assert 0.9 < spread < 1.15


def test_better_than_the_reference_scaled(candidates: Candidates) -> None:
    reference = make_reference(candidates)
    noise = np.random.default_rng(3).normal(0, 0.1, reference.shape)
    loss = reference * effects(candidates, format_=0.3, role=0.2, unit=0.3) * np.exp(noise)
    completed = run(candidates, loss, reference, 96)
    assert completed.measured is not None
    left_out = ~completed.measured
    log_ratio = np.log(loss / reference)
    scaled = log_ratio[left_out] - log_ratio[~left_out].mean()
    error = np.log(completed.loss / loss)[left_out]
    # 0.1 of noise that nothing predicts, and a unit's level from two pairs: 0.1 / sqrt(2) more.
    assert np.sqrt(np.mean(error**2)) < 1.3 * 0.1 * 1.5**0.5
    # The reference alone lacks all effects: 0.3 of the units' at the least.
    assert np.sqrt(np.mean(scaled**2)) > 0.3


def test_result_is_the_same_each_time(candidates: Candidates) -> None:
    reference = make_reference(candidates)
    loss = reference * effects(candidates, format_=0.3, unit=0.3)
    first, second = (run(candidates, loss, reference, 100) for _ in range(2))
    np.testing.assert_array_equal(first.loss, second.loss)
    np.testing.assert_array_equal(first.std_error, second.std_error)


def test_zero_of_a_reference_is_taken_for_its_least(candidates: Candidates) -> None:
    # An expert that no token of the reference visits.
    reference = make_reference(candidates)
    stand_in = reference * 10.0
    loss = reference.copy()
    reference[5] = 0.0
    reference[6, 2] = -1e-9
    completed = run(candidates, loss, reference, 96, stand_in)
    np.testing.assert_allclose(completed.loss, loss, rtol=5e-3)


def test_reference_of_zeros_gives_way_to_the_next(candidates: Candidates) -> None:
    stand_in = make_reference(candidates)
    loss = 3.0 * stand_in
    completed = run(candidates, loss, np.zeros_like(loss), 96, stand_in)
    np.testing.assert_allclose(completed.loss, loss, rtol=5e-3)


def test_measured_zeros_do_not_enter_the_ratio(candidates: Candidates) -> None:
    reference = make_reference(candidates)
    loss = 2.0 * reference
    lossy = np.ones_like(loss, dtype=bool)
    measured = choose_pairs(candidates.units, lossy, 150, seed=0)
    zero = np.argwhere(measured)[::7]
    loss[tuple(zero.T)] = 0.0
    loss[tuple(zero[0])] = -1e-15
    completed = complete(make_table(loss), measured, references=(reference,), candidates=candidates, lossy=lossy)
    np.testing.assert_array_equal(completed.loss[measured], loss[measured])
    np.testing.assert_allclose(completed.loss[~measured], 2.0 * reference[~measured], rtol=5e-3)


@pytest.mark.parametrize(
    ("units", "formats"),
    [
        ((make_unit("q_proj", 0),), FORMATS),
        (list_units(ROLES, 3), ("int4_g64",)),
        (tuple(make_unit(role, None) for role in ROLES), ("int4_g64", "int8_g64")),
        (list_units(("q_proj",), 1) + list_units(("down_proj",), 1), ("int3_g64", "int4_g64")),
    ],
    ids=["one_unit", "one_format", "no_layers", "two_by_two"],
)
def test_awkward_shapes(units: tuple, formats: tuple[str, ...]) -> None:  # type: ignore[type-arg]
    candidates = make_candidates(units, formats)
    reference = make_reference(candidates)
    measured = np.zeros(candidates.allowed.shape, dtype=bool)
    measured.ravel()[:2] = True
    loss = np.where(measured, 0.5 * reference, np.nan)
    completed = complete(
        make_table(loss), measured, references=(reference,), candidates=candidates, lossy=candidates.allowed
    )
    np.testing.assert_allclose(completed.loss, 0.5 * reference, rtol=5e-3)
    assert np.isfinite(completed.std_error).all()


def test_blocks_of_many_pairs(monkeypatch: pytest.MonkeyPatch, candidates: Candidates) -> None:
    reference = make_reference(candidates)
    loss = reference * effects(candidates, format_=0.3, unit=0.3)
    whole = run(candidates, loss, reference, 40)
    monkeypatch.setattr("sensitivity.sketches.completion._BLOCK", 7)
    parts = run(candidates, loss, reference, 40)
    np.testing.assert_allclose(parts.loss, whole.loss, rtol=1e-10)
    np.testing.assert_allclose(parts.std_error, whole.std_error, rtol=1e-10)


def test_left_out_errors_are_those_of_refitting() -> None:
    from sensitivity.sketches.completion import _Fit, _Observed

    generator = np.random.default_rng(0)
    unit = np.sort(generator.integers(0, 6, 15))
    columns, y = generator.normal(size=(15, 4)), generator.normal(size=15)
    variances = np.array([10.0, 0.0, 0.3, 2.0])
    fit = _Fit(_Observed(columns, y, unit), variances, 0.7)
    errors = []
    for i in range(15):
        rest = np.arange(15) != i
        refit = _Fit(_Observed(columns[rest], y[rest], unit[rest]), variances, 0.7)
        mean, _ = refit.predict(columns[i : i + 1], unit[i : i + 1])
        errors.append(y[i] - mean[0])
    assert fit.error == pytest.approx(np.mean(np.square(errors)), rel=1e-10)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_measured_losses_are_refused(candidates: Candidates, count: int) -> None:
    loss, measured = np.zeros(candidates.allowed.shape), candidates.allowed.copy()
    measured[4:] = False
    loss.ravel()[:count] = 0.1
    message = f"at least 2 measured losses must be above zero, .*: got {count} of {4 * F}. Measure more pairs"
    with pytest.raises(ValueError, match=message):
        complete(
            make_table(loss),
            measured,
            references=(make_reference(candidates),),
            candidates=candidates,
            lossy=candidates.allowed,
        )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(candidates: Candidates, value: float) -> None:
    reference = make_reference(candidates)
    measured = choose_pairs(candidates.units, candidates.allowed, 96, seed=0)
    u, f = np.argwhere(measured)[10]
    name, format_name = candidates.units[u].name, FORMATS[f]
    options = {"candidates": candidates, "lossy": candidates.allowed}
    wrong = reference.copy()
    wrong[u, f] = value
    with pytest.raises(
        ValueError, match=f"a loss must be a finite number: got {value} in unit '{name}' at {format_name}"
    ):
        complete(make_table(wrong), measured, references=(reference,), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"a reference must be a finite number: got {value} in unit '{name}'"):
        complete(make_table(reference), measured, references=(wrong,), **options)  # type: ignore[arg-type]
