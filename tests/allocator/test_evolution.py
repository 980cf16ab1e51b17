"""Evolution: finds a known optimum, never exceeds its passes or the limits, and is taken up from the store."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import allocator
from allocator.artefacts import Model
from allocator.assignments import list_uniform, use_of
from allocator.budget import MEMORY, Budget
from allocator.evolution import STEPS, Evolution, SelectionStep, count_generation, evolve
from allocator.improvement import PassCount
from allocator.level_switches import LevelSwitches
from allocator.problems import build_cost_tables
from allocator.store import Store
from sensitivity.evaluation import score_assignments
from sensitivity.profile import SensitivityProfile
from solvers import AllocationProblem, Termination, is_feasible
from tests.allocator.test_level_switches import list_feasible, make_problem

BUDGET = Budget(bits_per_weight=3.6)


class QuadraticLoss:
    """A loss with interactions that is known for every choice, in noise of its own for each sequence.

    An error shrinks with the use of the format, and every unit's has a direction of its own with a part in common.
    """

    def __init__(self, problem: AllocationProblem, *, seed: int, noise: float) -> None:
        rng = np.random.default_rng(seed)
        units = len(problem.allowed)
        errors = rng.uniform(0.5, 2.0, size=(units, 1)) * np.exp2(-np.argsort(np.argsort(problem.cost[0])))
        directions = 0.3 + np.eye(units)
        self.vectors = errors[:, :, None] * directions[:, None, :]
        self.noise = noise * rng.normal(size=(50, *problem.allowed.shape))
        self.passes = 0

    def __call__(self, choices: Sequence[NDArray[np.int64]], sequences: NDArray[np.int64]) -> list[float]:
        self.passes += (len(choices) + 1) * len(sequences)
        return [self.true(c) + float(self._noise(c)[sequences].mean()) for c in choices]

    def true(self, choice: Sequence[int] | NDArray[np.int64]) -> float:
        return float(np.square(self.vectors[np.arange(len(choice)), list(choice)].sum(axis=0)).sum())

    def _noise(self, choice: NDArray[np.int64]) -> NDArray[np.float64]:
        return self.noise[:, np.arange(len(choice)), choice].sum(axis=1)


def make_widths(seed: int, resources: int) -> AllocationProblem:
    """Returns six units of some sizes with 2, 3, 4 or 6 bits a weight, half-way to the most; each is read in part."""
    rng = np.random.default_rng(seed)
    stored = rng.integers(1, 4, size=6)[:, None] * np.array([2.0, 3.0, 4.0, 6.0])
    cost = np.stack([stored, stored * rng.uniform(0.5, 1.0, size=(6, 1))])[:resources]
    return AllocationProblem(
        loss=np.zeros((6, 4)),
        cost=cost,
        limit=cost[:, :, [0, -1]].sum(axis=1).mean(axis=1),
        allowed=np.ones((6, 4), dtype=bool),
        resources=("stored", "read")[:resources],
    )


@pytest.mark.parametrize("resources", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_the_best_of_all_choices_is_found(seed: int, resources: int) -> None:
    problem = make_widths(seed, resources)
    loss = QuadraticLoss(problem, seed=seed, noise=0.0)
    feasible = list_feasible(problem)
    best = min(map(loss.true, feasible))
    worst = max(feasible, key=loss.true)
    found = evolve(
        np.array(worst),
        LevelSwitches(problem),
        loss,
        sequences=50,
        passes=12_000,
        offspring=8,
        steps=STEPS,
        rng=np.random.default_rng(seed),
    )
    assert loss.true(found) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(
    "steps",
    [
        (SelectionStep(sequences=2, survivors=1),),
        STEPS,
        (
            SelectionStep(sequences=1, survivors=4),
            SelectionStep(sequences=3, survivors=2),
            SelectionStep(sequences=99, survivors=1),
        ),
    ],
    ids=["one_step", "default", "three_steps_and_all_sequences"],
)
def test_a_search_never_takes_more_passes_than_asked_nor_leaves_the_limits(steps: tuple[SelectionStep, ...]) -> None:
    problem = make_problem(1)
    loss = QuadraticLoss(problem, seed=1, noise=0.5)
    generation = count_generation(5, steps, 50)
    for passes in (generation, 3 * generation - 1):
        loss.passes = 0
        start = np.array(list_feasible(problem)[0])
        found = evolve(
            start,
            LevelSwitches(problem),
            loss,
            sequences=50,
            passes=passes,
            offspring=5,
            steps=steps,
            rng=np.random.default_rng(0),
        )
        assert 0 < loss.passes <= passes
        assert is_feasible(problem, found)


def test_the_parent_stays_where_no_offspring_is_better() -> None:
    problem = make_problem(2)
    loss = QuadraticLoss(problem, seed=2, noise=0.0)
    best = np.array(min(list_feasible(problem), key=loss.true))
    found = evolve(
        best,
        LevelSwitches(problem),
        loss,
        sequences=9,
        passes=900,
        offspring=4,
        steps=STEPS,
        rng=np.random.default_rng(0),
    )
    assert loss.true(found) == loss.true(best)


def make_evolution(
    profile: SensitivityProfile, store: Store, load_model: Callable[[], Any], /, **changes: Any
) -> Evolution:
    settings = {
        "profile": profile,
        "budget": BUDGET,
        "tables": build_cost_tables(profile),
        "store": store,
        "progress": lambda *_: None,
        "load_model": load_model,
        "passes": 400,
    }
    return Evolution(**{**settings, **changes})


def refuse() -> Any:
    pytest.fail("the model was loaded though everything is in the store")


def test_a_poor_start_is_improved_within_the_budget_and_from_the_store_again(
    tiny_profile: SensitivityProfile, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    store, tables = Store(tmp_path), build_cost_tables(tiny_profile)
    model = Model(str(tiny_llama_dir)).reference.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = min(list_uniform(tiny_profile.candidates, "combined"), key=lambda a: use_of(a.choice, tables)[MEMORY])
    count = PassCount()
    evolved = make_evolution(tiny_profile, store, lambda: model, count=count).run(start)
    assert evolved.name == f"{start.name}, evolved" and evolved.kind == "plan"
    named = {a.name: a.formats_by_weight(tiny_profile.candidates) for a in (start, evolved)}
    kl = score_assignments(model, named, torch.from_numpy(tiny_profile.calibration_tokens))
    assert kl[evolved.name].kl.mean() < kl[start.name].kl.mean()
    limit = tiny_profile.fixed_bytes + 3.6 * sum(u.weight_count for u in tiny_profile.candidates.units) / 8
    assert use_of(evolved.choice, tables)[MEMORY] <= limit
    assert 0 < count.passes <= 400
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = PassCount()
    taken_up = make_evolution(tiny_profile, store, refuse, count=again).run(start)
    np.testing.assert_array_equal(taken_up.choice, evolved.choice)
    assert again == count


def test_the_verb_measures_what_both_improvements_found_beside_the_rivals(
    tiny_profile: SensitivityProfile, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    made = allocator.plan(
        str(tiny_llama_dir),
        BUDGET,
        metric="weight_error",
        refine=1,
        evolve=300,
        profile=tiny_profile,
        store=Store(tmp_path),
    )
    kl = {e.name: e.kl for e in made.evaluations}
    assert any(name.endswith(", evolved") for name in kl)
    assert kl[made.name] == min(kl.values())
    assert made.memory_bytes <= made.limits[MEMORY]
    if made.name.endswith(", evolved"):
        assert made.termination == Termination.FEASIBLE.value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passes": 1}, r"passes of evolution must be enough for one generation, \d+: got 1"),
        ({"budget": Budget(max_kl=0.1)}, "evolution lowers the loss under limits: got"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    changes: dict[str, Any], message: str, tiny_profile: SensitivityProfile, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make_evolution(tiny_profile, Store(tmp_path), refuse, **changes)


def test_a_start_over_the_budget_is_refused(tiny_profile: SensitivityProfile, tmp_path: Path) -> None:
    tables = build_cost_tables(tiny_profile)
    largest = max(list_uniform(tiny_profile.candidates, "combined"), key=lambda a: use_of(a.choice, tables)[MEMORY])
    with pytest.raises(ValueError, match=f"start of a search must keep the budget: got '{largest.name}' with memory"):
        make_evolution(tiny_profile, Store(tmp_path), refuse).run(largest)


def test_evolution_without_verification_is_refused(tiny_profile: SensitivityProfile) -> None:
    with pytest.raises(ValueError, match="evolution measure: got refine=0, evolve=300 without verification"):
        allocator.plan(tiny_profile, BUDGET, verify=False, evolve=300)
