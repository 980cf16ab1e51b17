"""Plans count as stable when more sequences would not change what they lose, and measuring stops there."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import allocator
from allocator.assignments import list_uniform, pick
from allocator.planning import find_assignment, predicted_std_error
from allocator.problems import build_cost_tables
from allocator.stability import PlanStability
from allocator.store import Store
from runtime.candidates import Candidates, list_candidates
from runtime.costs import memory_cost
from runtime.units import find_units
from sensitivity.measure_config import FISHER, WEIGHT_ERROR
from sensitivity.profile import SensitivityProfile
from sensitivity.sketches.fisher_pieces import FIRST_SEQUENCES, measure_growing_sketch
from sensitivity.sketches.fisher_sketch import fisher_loss
from tests.tiny_measurements import CONFIG, make_request
from tests.tiny_models import build_tiny_llama

FORMATS = ("int2_g64", "int3_g64", "int4_g64", "int8_g64")


@pytest.fixture(scope="module")
def candidates() -> Candidates:
    return list_candidates(find_units(build_tiny_llama()), FORMATS)


def draw_sketch(candidates: Candidates, seed: int, sequences: int) -> NDArray[np.float32]:
    """Returns normal scores of units that differ much, each format a third of the error of the one before."""
    rng = np.random.default_rng(seed)
    sensitivity = np.exp(np.linspace(-2.0, 2.0, len(candidates.units)))
    errors = sensitivity[:, None] * 3.0 ** -np.arange(len(candidates.formats))
    return (errors * rng.standard_normal((sequences, len(candidates.units), 1))).astype(np.float32)


def test_many_sequences_of_one_kind_are_stable(candidates: Candidates) -> None:
    assert PlanStability(candidates).is_stable(2000, draw_sketch(candidates, 0, 4000))


def test_sequences_of_another_kind_are_not(candidates: Candidates) -> None:
    early, late = draw_sketch(candidates, 0, 500), draw_sketch(candidates, 1, 500)[:, ::-1]
    assert not PlanStability(candidates).is_stable(500, np.concatenate([early, late, late]))


def test_what_looks_equal_by_chance_is_within_its_error(candidates: Candidates) -> None:
    """Whatever plans differ in when the sketch is noise alone is no more than noise: most draws say so."""
    stable = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        noise = rng.standard_normal((4000, *candidates.allowed.shape)).astype(np.float32)
        stable += PlanStability(candidates).is_stable(2000, noise)
    assert stable >= 15


def test_budgets_are_bytes_of_uniform_formats(candidates: Candidates) -> None:
    memory = memory_cost(candidates, 0).cost
    uniform = {float(pick(memory, a.choice).sum()) for a in list_uniform(candidates, FISHER)}
    limits = PlanStability(candidates).limits
    assert set(limits) <= uniform and limits == sorted(set(limits)) and 2 <= len(limits) <= 4
    assert min(uniform) < limits[0] and limits[-1] < max(uniform)
    one = list_candidates(candidates.units, ("int8_g64",))
    assert PlanStability(one).is_stable(2, draw_sketch(one, 0, 4))


@pytest.mark.parametrize("stops_at", [2, 3, 9])
def test_sequences_are_doubled_until_stable_and_measured_once(stops_at: int, tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []
    measured: list[tuple[int, int]] = []

    def measure(*, first: int, last: int, pieces: Path) -> NDArray[np.float32]:
        measured.append((first, last))
        assert pieces.parent == tmp_path
        return np.arange(first, last, dtype=np.float32)[:, None, None]

    def is_stable(earlier: int, sketch: NDArray[np.float32]) -> bool:
        asked.append((earlier, len(sketch)))
        return len(asked) + 1 == stops_at

    sketch = measure_growing_sketch(measure, 100, is_stable=is_stable, pieces=tmp_path)
    F = FIRST_SEQUENCES
    steps = [(0, F), (F, 2 * F), (2 * F, 4 * F), (4 * F, 100)][:stops_at]
    assert measured == steps
    assert asked == steps[1:]
    np.testing.assert_array_equal(sketch[:, 0, 0], np.arange(steps[-1][1]))


def test_the_measurement_stops_and_says_where(tiny_llama_dir: Path, tiny_text: Path, tmp_path: Path) -> None:
    amounts = {"metrics": (WEIGHT_ERROR, FISHER), "fisher_sequences": 100, "sequence_tokens": 8, "fit_plans": None}
    config = replace(CONFIG, **amounts)
    store = Store(tmp_path)
    grown = allocator.measure(
        str(tiny_llama_dir), request=make_request(tiny_text, config=replace(config, until_stable=True)), store=store
    )
    whole = allocator.measure(str(tiny_llama_dir), request=make_request(tiny_text, config=config), store=store)
    assert grown.fisher_sketch is not None and whole.fisher_sketch is not None
    count = len(grown.fisher_sketch)
    assert count in (32, 64, 100) and grown.provenance["fisher_sequences"] == str(count)
    assert whole.provenance["fisher_sequences"] == "100" and whole.fingerprint != grown.fingerprint
    # The same labels and text: the same numbers to the rounding of sums over other numbers of sequences at once.
    scale = np.abs(whole.fisher_sketch).max()
    np.testing.assert_allclose(grown.fisher_sketch, whole.fisher_sketch[:count], atol=1e-5 * scale)
    assert not list(store.pieces(grown.fingerprint).glob("*"))
    stability = PlanStability(grown.candidates)
    steps = [(16, 32), (32, 64), (64, 100)]
    verdicts = [stability.is_stable(before, grown.fisher_sketch[:after]) for before, after in steps if after <= count]
    assert not any(verdicts[:-1]) and (verdicts[-1] or count == 100)


def test_a_plan_carries_the_standard_error_of_its_prediction(tiny_profile: SensitivityProfile) -> None:
    tables = build_cost_tables(tiny_profile)
    budget = allocator.Budget(bits_per_weight=4.0)
    made = allocator.plan(tiny_profile, budget, metric=FISHER, verify=False)
    choice = find_assignment(tiny_profile, budget, tables, metric=FISHER).choice
    assert tiny_profile.fisher_sketch is not None
    sums = [
        sum(0.5 * float(tiny_profile.fisher_sketch[s, u, f]) ** 2 for u, f in enumerate(choice))
        for s in range(len(tiny_profile.fisher_sketch))
    ]
    assert made.predicted_kl == pytest.approx(np.mean(sums))
    assert made.predicted_std_error == pytest.approx(np.std(sums, ddof=1) / len(sums) ** 0.5)
    combined = find_assignment(tiny_profile, budget, tables, metric="combined")
    errors = pick(tiny_profile.table("combined").std_error, combined.choice)
    assert predicted_std_error(tiny_profile, combined) == pytest.approx(np.sqrt(np.square(errors).sum()))
    np.testing.assert_array_equal(fisher_loss(tiny_profile.fisher_sketch)[0], tiny_profile.table(FISHER).loss)
