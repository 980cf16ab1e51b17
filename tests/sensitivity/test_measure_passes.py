"""A bounded number of passes: what is measured, what is completed, and what the model is run for."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime.candidates import list_candidates
from sensitivity.experts.expert_tables import FISHER_SHRUNK
from sensitivity.measure_config import FISHER, OUTPUT_ERROR, SINGLE_UNIT_KL, WEIGHT_ERROR
from sensitivity.profile import SensitivityProfile
from sensitivity.profile_files import load_profile, save_profile
from sensitivity.sketches.combination import COMBINED
from sensitivity.sketches.completion import complete
from tests.sensitivity.measured_models import FORMATS, Measurement, arrays_of, make_config, make_measurement

Calls = list[tuple[str, int, int]]


def count_passes(measurement: Measurement, run: Callable[[], object]) -> int:
    """Returns how many times the model ran."""
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    hook = measurement.reference.model.lm_head.register_forward_hook(count)
    run()
    hook.remove()
    return passes


@pytest.mark.parametrize("passes", [2, 9, 15, 30])
def test_passes_are_bounded_and_the_rest_is_completed(
    measurement: Measurement, whole: SensitivityProfile, tmp_path: Path, passes: int
) -> None:
    few = replace(measurement, config=replace(measurement.config, logit_passes=passes, metrics=(SINGLE_UNIT_KL,)))
    # One for the reference; and five plans, four and one beside the reference again.
    assert count_passes(few, lambda: few.run(tmp_path / "alone", lambda *_: None)) == passes + 1 + 5 + 2
    few = replace(measurement, config=replace(measurement.config, logit_passes=passes))
    calls: Calls = []
    profile = few.run(tmp_path / "all", lambda *call: calls.append(call))
    assert list(profile.losses) == list(whole.losses)
    assert profile.logit_gram is None
    table, full = profile.table(SINGLE_UNIT_KL), whole.table(SINGLE_UNIT_KL)
    assert table.measured is not None and table.measured.sum() == passes
    np.testing.assert_array_equal(table.loss[table.measured], full.loss[table.measured])
    np.testing.assert_array_equal(table.std_error[table.measured], full.std_error[table.measured])
    lossy = whole.table(WEIGHT_ERROR).loss > 0
    expected = complete(
        full,
        table.measured,
        references=[whole.table(metric).loss for metric in (FISHER, OUTPUT_ERROR, WEIGHT_ERROR)],
        candidates=measurement.candidates,
        lossy=lossy,
    )
    np.testing.assert_array_equal(table.loss, expected.loss)
    np.testing.assert_array_equal(table.std_error, expected.std_error)
    assert (table.loss[lossy] > 0).all()
    combined = profile.table(COMBINED)
    assert combined.measured is not None
    np.testing.assert_array_equal(combined.measured, table.measured)
    # Only units with a pair are a piece.
    units = int(table.measured.any(axis=1).sum())
    assert [call for call in calls if call[0] == SINGLE_UNIT_KL] == [
        (SINGLE_UNIT_KL, d, units) for d in range(units + 1)
    ]
    assert len(list((tmp_path / "all" / "logit").iterdir())) == units


@pytest.mark.parametrize("passes", [45, 44, None], ids=str)
def test_enough_passes_for_every_lossy_pair_give_cross_terms_too(
    measurement: Measurement, whole: SensitivityProfile, tmp_path: Path, passes: int | None
) -> None:
    # The tied embedding is not offered the narrowest of three formats, so 44 pairs are allowed.
    assert measurement.candidates.allowed.sum() == 44
    enough = replace(measurement, config=replace(measurement.config, logit_passes=passes))
    profile = enough.run(tmp_path, lambda *_: None)
    arrays = arrays_of(profile)
    for name, array in arrays_of(whole).items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    assert all(table.measured is None for table in profile.losses.values())


def test_lossless_pairs_take_no_pass(measurement: Measurement, tmp_path: Path) -> None:
    model = copy.deepcopy(measurement.reference.model).bfloat16().float()
    exact = replace(
        measurement,
        reference=replace(measurement.reference, model=model),
        config=replace(measurement.config, logit_passes=20, metrics=(SINGLE_UNIT_KL,)),
    )
    profile = exact.run(tmp_path, lambda *_: None)
    table, bf16 = profile.table(SINGLE_UNIT_KL), FORMATS.index("bf16")
    assert table.measured is not None and table.measured[:, bf16].all() and not table.loss[:, bf16].any()
    assert table.measured[:, :bf16].sum() == 20
    # Where nothing is lossy there is nothing to complete either.
    candidates = list_candidates(measurement.candidates.units, ("bf16",))
    none = replace(exact, candidates=candidates, config=replace(exact.config, logit_passes=2))
    profile = none.run(tmp_path / "none", lambda *_: None)
    assert not profile.table(SINGLE_UNIT_KL).loss.any()
    assert profile.logit_gram is not None and not profile.logit_gram.any()


def test_seed_chooses_the_pairs(measurement: Measurement, tmp_path: Path) -> None:
    def run(seed: int) -> SensitivityProfile:
        config = replace(measurement.config, logit_passes=10, metrics=(SINGLE_UNIT_KL,), seed=seed)
        return replace(measurement, config=config).run(tmp_path / str(seed), lambda *_: None)

    measured = [run(seed).table(SINGLE_UNIT_KL).measured for seed in (0, 1)]
    assert measured[0] is not None and measured[1] is not None
    assert (measured[0] != measured[1]).any()


def test_completion_without_the_weight_error_among_the_metrics(measurement: Measurement, tmp_path: Path) -> None:
    config = replace(measurement.config, logit_passes=20, metrics=(FISHER, SINGLE_UNIT_KL))
    calls: Calls = []
    profile = replace(measurement, config=config).run(tmp_path, lambda *call: calls.append(call))
    assert list(profile.losses) == [FISHER, SINGLE_UNIT_KL, COMBINED]
    # It is needed all the same, and its progress is shown.
    assert [stage for stage, *_ in calls].count(WEIGHT_ERROR) == 2


@pytest.mark.parametrize("name", ["tiny_mixtral_dir", "tiny_qwen_moe_dir"])
def test_mixtures_of_experts_with_fewer_passes_than_units(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    config = replace(make_config(fisher_sequences=2), logit_passes=12)
    measurement = make_measurement(request.getfixturevalue(name), config)
    assert len(measurement.candidates.units) > 12
    profile = measurement.run(tmp_path / "pieces", lambda *_: None)
    assert list(profile.losses) == [WEIGHT_ERROR, OUTPUT_ERROR, FISHER, FISHER_SHRUNK, SINGLE_UNIT_KL, COMBINED]
    table = profile.table(SINGLE_UNIT_KL)
    assert table.measured is not None and table.measured.sum() == 12
    lossy = measurement.candidates.allowed & (profile.table(WEIGHT_ERROR).loss > 0)
    for part in (table.loss, table.std_error):
        assert np.isfinite(part).all() and (part[lossy] > 0).all()
    save_profile(profile, tmp_path / "profile")
    loaded = load_profile(tmp_path / "profile")
    assert loaded.logit_gram is None
    np.testing.assert_array_equal(loaded.table(SINGLE_UNIT_KL).measured, table.measured)
