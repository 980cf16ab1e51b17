"""Verification: nothing is measured twice, the best measured assignment ships, and the verdict says what was found."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import allocator
from allocator.artefacts import Model
from allocator.assignments import Assignment, list_uniform
from allocator.budget import Budget, InfeasibleBudget
from allocator.problems import build_cost_tables
from allocator.store import Store
from allocator.verification import choose_best, describe_choice, make_evaluation, score_cached
from runtime.costs import CostTable
from sensitivity.evaluation import SequenceScores, mean_interval
from sensitivity.profile import LossTable, SensitivityProfile


class Counted:
    """A model with its forward passes and its loads counted."""

    def __init__(self, directory: Path) -> None:
        self.model = Model(str(directory))
        self.loads = self.passes = 0

    def load(self) -> Any:
        self.loads += 1
        reference = self.model.reference.model
        if self.loads == 1:
            reference.register_forward_hook(self._count)
        return reference

    def _count(self, *_: Any) -> None:
        self.passes += 1


@pytest.fixture
def counted(tiny_llama_dir: Path) -> Counted:
    return Counted(tiny_llama_dir)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def score(
    tiny_profile: SensitivityProfile, counted: Counted, store: Store
) -> Callable[[dict[str, dict[str, str]]], dict[str, SequenceScores]]:
    def run(formats: dict[str, dict[str, str]]) -> dict[str, SequenceScores]:
        return score_cached(
            tiny_profile,
            formats,
            tiny_profile.selection_tokens,
            load_model=counted.load,
            store=store,
            progress=lambda *_: None,
        )

    return run


def test_nothing_is_measured_twice(
    tiny_profile: SensitivityProfile, counted: Counted, score: Callable[..., dict[str, SequenceScores]]
) -> None:
    uniform = {a.name: a.formats_by_weight(tiny_profile.candidates) for a in list_uniform(tiny_profile.candidates, "m")}
    names = list(uniform)
    first = score({name: uniform[name] for name in names[:2]})
    assert (counted.loads, counted.passes) == (1, 3)  # one group of sequences: the reference and two assignments
    again = score({name: uniform[name] for name in names[:2]})
    assert (counted.loads, counted.passes) == (1, 3)
    for name in names[:2]:
        np.testing.assert_array_equal(first[name].kl, again[name].kl)
        np.testing.assert_array_equal(first[name].nll, again[name].nll)
    # By content: another name for the same formats is no new measurement, a new one among them is the only one.
    mixed = score({"alias": uniform[names[0]], names[2]: uniform[names[2]]})
    assert (counted.loads, counted.passes) == (2, 5)
    np.testing.assert_array_equal(mixed["alias"].kl, first[names[0]].kl)


def test_second_query_measures_nothing(tiny_profile: SensitivityProfile, tiny_llama_dir: Path, store: Store) -> None:
    budget = Budget(bits_per_weight=4.5)
    model = Model(str(tiny_llama_dir))
    first = allocator.plan(model, budget, profile=tiny_profile, store=store)
    # A profile alone has no model to measure with: everything must be in the store.
    again = allocator.plan(tiny_profile, budget, store=store)
    assert again.evaluations == first.evaluations
    with pytest.raises(ValueError, match=r"verified with its model: got a profile alone\. Pass the model, or verify"):
        allocator.plan(tiny_profile, Budget(bits_per_weight=5.5), store=store)


def make_assignments(profile: SensitivityProfile) -> list[Assignment]:
    uniform = {a.name: a for a in list_uniform(profile.candidates, "combined")}
    plan = replace(uniform["uniform int3_g64"], name="plan", kind="plan")
    return [plan, uniform["uniform int4_g64"], uniform["uniform int8_g64"]]


def scores_of(values: dict[str, list[float]]) -> dict[str, SequenceScores]:
    return {name: SequenceScores(kl=np.array(kl), nll=np.array(kl) + 1) for name, kl in values.items()}


def memory_of(profile: SensitivityProfile) -> CostTable:
    return build_cost_tables(profile)["memory_bytes"]


PLAN, FOUR, EIGHT = "plan", "uniform int4_g64", "uniform int8_g64"


@pytest.mark.parametrize(
    ("fields", "kl", "best"),
    [
        ({"bits_per_weight": 9}, {PLAN: 0.3, FOUR: 0.2, EIGHT: 0.4}, FOUR),
        ({"bits_per_weight": 9}, {PLAN: 0.1, FOUR: 0.2, EIGHT: 0.4}, PLAN),
        ({"max_kl": 0.35}, {PLAN: 0.3, FOUR: 0.2, EIGHT: 0.1}, PLAN),
        ({"max_kl": 0.25}, {PLAN: 0.3, FOUR: 0.2, EIGHT: 0.1}, FOUR),
        ({"max_kl": 0.05}, {PLAN: 0.3, FOUR: 0.2, EIGHT: 0.1}, None),
    ],
)
def test_best(
    fields: dict[str, float], kl: dict[str, float], best: str | None, tiny_profile: SensitivityProfile
) -> None:
    scores = scores_of({name: [value - 0.01, value + 0.01] for name, value in kl.items()})
    budget = Budget(**fields)
    found = choose_best(make_assignments(tiny_profile), scores, memory_of(tiny_profile), budget)
    assert (found.name if found else None) == best


@pytest.mark.parametrize(
    ("shipped", "kl", "expected"),
    [
        (0, {PLAN: [0.1, 0.1, 0.1], FOUR: [0.2, 0.21, 0.22], EIGHT: [1, 1, 1]}, "the interval excludes no gain"),
        (0, {PLAN: [0.1, 0.3, 0.1], FOUR: [0.2, 0.21, 0.22], EIGHT: [1, 1, 1]}, "the interval includes no gain"),
        (0, {PLAN: [0.1, 0.1, 0.1], FOUR: [0.2, 0.2, 0.2], EIGHT: [1, 1, 1]}, "0.50 times); gain 0.1, 95 % 0.1 to 0.1"),
        (1, {PLAN: [0.3, 0.3, 0.3], FOUR: [0.2, 0.2, 0.2], EIGHT: [1, 1, 1]}, f"No plan measured better than '{FOUR}'"),
        (0, {PLAN: [0.0, 0.0, 0.0], FOUR: [0.0, 0.0, 0.0], EIGHT: [1, 1, 1]}, "gain 0, 95 %"),
    ],
)
def test_verdict(shipped: int, kl: dict[str, list[float]], expected: str, tiny_profile: SensitivityProfile) -> None:
    assignments = make_assignments(tiny_profile)
    assert expected in describe_choice(assignments[shipped], assignments, scores_of(kl))


def test_verdict_without_a_uniform_format_in_the_budget(tiny_profile: SensitivityProfile) -> None:
    plan = make_assignments(tiny_profile)[0]
    assert "no uniform format fits" in describe_choice(plan, [plan], scores_of({PLAN: [0.1, 0.2]}))


def test_evaluation(tiny_profile: SensitivityProfile) -> None:
    scores = SequenceScores(kl=np.array([0.0, 0.01, 0.2]), nll=np.array([1.0, 2.0, 3.0]))
    tokens = np.zeros((3, 7), dtype=np.int64)
    memory = memory_of(tiny_profile)
    assignment = make_assignments(tiny_profile)[2]
    found = make_evaluation(tiny_profile, assignment, scores, tokens, memory, shipped=True)
    assert (found.name, found.kind, found.tokens, found.shipped) == (EIGHT, "uniform", 21, True)
    assert found.kl == pytest.approx(0.07)
    assert found.kl_low == 0.0 and found.kl_high == mean_interval(scores.kl)[2]
    assert (found.perplexity, found.perplexity_low) == pytest.approx(
        (np.exp(2.0), np.exp(mean_interval(scores.nll)[1]))
    )
    units = np.arange(len(assignment.choice))
    assert found.memory_bytes == tiny_profile.fixed_bytes + memory.cost[units, assignment.choice].sum()
    assert found.predicted_kl == pytest.approx(tiny_profile.table("combined").loss[units, assignment.choice].sum())
    reference = make_evaluation(tiny_profile, None, scores, tokens, memory)
    assert (reference.kind, reference.predicted_kl) == ("reference", None)
    assert reference.memory_bytes == tiny_profile.reference_bytes


def mislead(profile: SensitivityProfile) -> SensitivityProfile:
    """Returns the profile with its predictions turned round: what loses most is said to lose least."""
    losses = {
        name: LossTable(loss=-table.loss, std_error=table.std_error, unit_of_measure=table.unit_of_measure)
        for name, table in profile.losses.items()
    }
    return replace(profile, losses=losses, logit_gram=None)


def test_uniform_ships_when_it_measures_best(
    tiny_profile: SensitivityProfile, tiny_llama_dir: Path, store: Store
) -> None:
    wrong = mislead(tiny_profile)
    made = allocator.plan(str(tiny_llama_dir), Budget(bits_per_weight=8.6), profile=wrong, store=store)
    best = min(made.evaluations, key=lambda e: e.kl)
    assert best.kind == "uniform" and best.shipped and made.shipped == best
    assert made.name == best.name
    assert made.verdict.startswith(f"No plan measured better than '{best.name}'")
    assert made.termination == "uniform rule"
    formats = {unit.format for unit in made.units}
    assert len(formats) == 1


@pytest.mark.parametrize("ceiling", [0.02, 0.2])
def test_measured_loss_keeps_the_ceiling(
    ceiling: float, tiny_profile: SensitivityProfile, tiny_llama_dir: Path, tiny_store: Store
) -> None:
    made = allocator.plan(str(tiny_llama_dir), Budget(max_kl=ceiling), profile=tiny_profile, store=tiny_store)
    assert made.shipped is not None and made.shipped.kl <= ceiling
    kept = [e for e in made.evaluations if e.kl <= ceiling]
    assert made.memory_bytes == min(e.memory_bytes for e in kept)
    choices = [e.name for e in made.evaluations]
    assert len(set(choices)) == len(choices)


def test_ceiling_that_no_measured_plan_keeps(
    tiny_profile: SensitivityProfile, tiny_llama_dir: Path, tiny_store: Store
) -> None:
    """Predictions of nothing but gains let any ceiling seem reachable; the value named is reached as measured."""
    wrong = mislead(tiny_profile)

    def ask(ceiling: float) -> Any:
        return allocator.plan(str(tiny_llama_dir), Budget(max_kl=ceiling), profile=wrong, store=tiny_store)

    with pytest.raises(InfeasibleBudget, match=r"which no measured plan keeps\. The least measured is") as caught:
        ask(1e-9)
    assert list(caught.value.least_use) == ["max_kl"]
    made = ask(caught.value.least_use["max_kl"])
    assert made.shipped.kl == caught.value.least_use["max_kl"]


def test_metric_that_despairs_of_a_ceiling_does_not_stop_the_others(
    tiny_profile: SensitivityProfile, tiny_llama_dir: Path, tiny_store: Store
) -> None:
    fisher = tiny_profile.table("fisher")
    dark = replace(
        tiny_profile,
        losses={**tiny_profile.losses, "fisher": replace(fisher, loss=np.abs(fisher.loss) + 1.0)},
    )
    made = allocator.plan(str(tiny_llama_dir), Budget(max_kl=0.2), profile=dark, store=tiny_store)
    assert made.shipped is not None and made.shipped.kl <= 0.2


def test_the_reference_has_the_bits_of_its_own_type(
    tiny_profile: SensitivityProfile, score: Callable[..., dict[str, SequenceScores]]
) -> None:
    """The tiny model is stored in float32: 32 bits for every weight of a unit, whatever a packed file adds."""
    tables = build_cost_tables(tiny_profile)
    scores = score({"reference": {}})["reference"]
    made = make_evaluation(tiny_profile, None, scores, tiny_profile.selection_tokens, tables["memory_bytes"])
    assert made.bits_per_weight == 32.0
