"""The model of plans near a plan: slopes as a weighted sample, and the factor that measured plans give."""

import numpy as np
import pytest

from allocator.local_model import (
    FORGETTING,
    LARGEST_FACTOR,
    LARGEST_NORM,
    LEAST_FACTOR,
    LocalModel,
    MeasuredSlope,
    Observations,
    build_local_model,
    combine_slopes,
    limit_norms,
)

UNITS, FORMATS = 5, 4


@pytest.fixture
def model() -> LocalModel:
    rng = np.random.default_rng(1)
    choice = rng.integers(0, FORMATS, UNITS)
    slopes = [
        MeasuredSlope(values=rng.normal(size=(sequences, UNITS, FORMATS)), age=age)
        for sequences, age in ((6, 1), (8, 0))
    ]
    return build_local_model(choice, slopes, rng.normal(size=(9, UNITS, FORMATS)).astype(np.float32), 2.0)


def change_units(choice: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    changed = choice.copy()
    units = rng.choice(UNITS, size=1 + seed % UNITS, replace=False)
    changed[units] = (choice[units] + rng.integers(1, FORMATS, len(units))) % FORMATS
    return changed


def sum_over(table: np.ndarray, choice: np.ndarray) -> float:
    return float(table[np.arange(UNITS), choice].sum())


def test_the_plan_itself_changes_nothing(model: LocalModel) -> None:
    assert sum_over(model.slope, model.choice) == sum_over(model.curvature, model.choice) == 0.0
    assert sum_over(model.std_error, model.choice) == 0.0
    assert (model.curvature >= 0.0).all()


def test_curvature_is_half_the_mean_square_of_the_sketches_difference() -> None:
    rng = np.random.default_rng(2)
    sketch = rng.normal(size=(7, UNITS, FORMATS))
    choice = np.array([0, 1, 2, 3, 0])
    built = build_local_model(choice, [MeasuredSlope(values=np.zeros((2, UNITS, FORMATS)))], sketch, 1.0)
    for u in range(UNITS):
        for f in range(FORMATS):
            difference = sketch[:, u, f] - sketch[:, u, choice[u]]
            assert built.curvature[u, f] == pytest.approx(0.5 * np.mean(difference**2), abs=1e-12)


def compare(model: LocalModel, pairs: list[tuple[np.ndarray, np.ndarray]], change: np.ndarray) -> Observations:
    choices, bases = (np.array(plans).reshape(len(pairs), UNITS) for plans in zip(*pairs, strict=True))
    return Observations(choices=choices, bases=bases, change=change, std_error=np.full(len(pairs), 0.1))


def sums(table: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    return np.array([sum_over(table, choice) - sum_over(table, base) for choice, base in pairs])


def draw_pairs(model: LocalModel, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns plans with what they are compared with: the model's plan, or another plan near by."""
    bases = [model.choice if seed % 2 else change_units(model.choice, 20 + seed) for seed in range(count)]
    return [(change_units(model.choice, seed), base) for seed, base in enumerate(bases)]


def test_sums_of_single_changes_from_base_to_choice(model: LocalModel) -> None:
    pairs = draw_pairs(model, 7)
    observed = compare(model, pairs, np.zeros(7))
    np.testing.assert_allclose(observed.sum_over(model.slope), sums(model.slope, pairs), atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 1.7, 3.9])
def test_a_loss_that_is_the_model_gives_its_factor_back(factor: float, model: LocalModel) -> None:
    pairs = draw_pairs(model, 6)
    measured = sums(model.slope, pairs) + factor * sums(model.curvature, pairs)
    assert model.fit(compare(model, pairs, measured)).factor == pytest.approx(factor, rel=1e-9)


def test_the_factor_is_that_of_least_squares(model: LocalModel) -> None:
    rng = np.random.default_rng(3)
    pairs = draw_pairs(model, 9)
    curvature = sums(model.curvature, pairs)
    rest = 2.5 * curvature + 0.3 * rng.normal(size=9)
    expected = np.linalg.lstsq(curvature[:, None], rest, rcond=None)[0][0]
    assert LEAST_FACTOR < expected < LARGEST_FACTOR
    fitted = model.fit(compare(model, pairs, rest + sums(model.slope, pairs)))
    assert fitted.factor == pytest.approx(expected, rel=1e-9)


def test_the_factor_stays_within_its_bounds_and_without_plans_what_it_was(model: LocalModel) -> None:
    pairs = [(change_units(model.choice, 4), model.choice)]
    slope, curvature = sums(model.slope, pairs), sums(model.curvature, pairs)
    assert model.fit(compare(model, pairs, slope + 50.0 * curvature)).factor == LARGEST_FACTOR
    assert model.fit(compare(model, pairs, slope - curvature)).factor == LEAST_FACTOR
    nothing = np.zeros((0, UNITS), dtype=np.int64)
    none = Observations(choices=nothing, bases=nothing, change=np.zeros(0), std_error=np.zeros(0))
    assert model.fit(none).factor == model.factor
    assert model.fit(compare(model, [(model.choice, model.choice)], np.array([0.3]))).factor == model.factor


def test_slopes_combine_as_a_weighted_sample() -> None:
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=(5, 3, 4)), rng.normal(size=(7, 3, 4))
    choice = np.array([1, 0, 3])
    mean, error = combine_slopes([MeasuredSlope(values=old, age=1), MeasuredSlope(values=new)], choice)
    weights = np.concatenate([np.full(5, FORGETTING), np.ones(7)])
    relative = np.concatenate([old, new])
    relative = relative - np.take_along_axis(relative, choice[None, :, None].repeat(12, axis=0), axis=2)
    expected = (weights[:, None, None] * relative).sum(axis=0) / weights.sum()
    np.testing.assert_allclose(mean, expected, atol=1e-12)
    spread = (weights[:, None, None] * (relative - expected) ** 2).sum(axis=0) / weights.sum()
    effective = weights.sum() ** 2 / (weights**2).sum()
    np.testing.assert_allclose(error, np.sqrt(spread / effective), atol=1e-12)
    assert np.all(mean[np.arange(3), choice] == 0.0)
    one, one_error = combine_slopes([MeasuredSlope(values=new, age=3)], choice)
    np.testing.assert_allclose(one_error[0, 0], (new[:, 0, 0] - new[:, 0, 1]).std() / np.sqrt(7), atol=1e-12)
    np.testing.assert_allclose(one[0, 0], (new[:, 0, 0] - new[:, 0, 1]).mean(), atol=1e-12)


def test_one_sequence_does_not_outweigh_the_others() -> None:
    slope = np.ones((5, 2, 3))
    slope[2] *= 100.0
    limited = limit_norms(slope)
    np.testing.assert_array_equal(np.delete(limited, 2, axis=0), np.delete(slope, 2, axis=0))
    np.testing.assert_allclose(limited[2], LARGEST_NORM)
    np.testing.assert_array_equal(limit_norms(np.zeros((3, 2, 2))), np.zeros((3, 2, 2)))
