"""Switches keep every limit, spend what is left over, and reach every choice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.level_switches import LevelSwitches
from solvers import AllocationProblem, is_feasible


def make_problem(
    seed: int, *, units: int = 5, formats: int = 4, resources: int = 2, room: float = 0.5
) -> AllocationProblem:
    """Returns a problem with some candidates ruled out, ``room`` of the way from the least to the most use."""
    rng = np.random.default_rng(seed)
    allowed = rng.random((units, formats)) < 0.8
    allowed[np.arange(units), rng.integers(formats, size=units)] = True
    cost = rng.integers(0, 20, size=(resources, units, formats)).astype(np.float64)
    problem = AllocationProblem(
        loss=np.zeros((units, formats)),
        cost=cost,
        limit=np.full(resources, np.inf),
        allowed=allowed,
        resources=tuple(f"r{r}" for r in range(resources)),
    )
    least, most = problem.least_use, problem.most_use
    return AllocationProblem(
        loss=problem.loss, cost=cost, limit=least + room * (most - least), allowed=allowed, resources=problem.resources
    )


def list_feasible(problem: AllocationProblem) -> list[tuple[int, ...]]:
    grids = np.meshgrid(*[np.flatnonzero(row) for row in problem.allowed], indexing="ij")
    choices = np.stack([grid.ravel() for grid in grids], axis=1)
    return [tuple(map(int, choice)) for choice in choices if is_feasible(problem, choice)]


@given(st.integers(0, 10_000), st.integers(1, 3), st.floats(0.0, 1.0))
def test_what_a_switch_gives_keeps_every_limit_and_is_another_choice(seed: int, resources: int, room: float) -> None:
    problem = make_problem(seed, resources=resources, room=room)
    feasible = list_feasible(problem)
    if not feasible:
        return
    rng = np.random.default_rng(seed)
    parent = np.array(feasible[seed % len(feasible)])
    kept = parent.copy()
    switches = LevelSwitches(problem)
    for _ in range(20):
        child = switches.mutate(parent, rng)
        np.testing.assert_array_equal(parent, kept)
        if child is not None:
            assert is_feasible(problem, child)
            assert not np.array_equal(child, parent)


@pytest.mark.parametrize("seed", range(4))
def test_every_choice_that_wastes_nothing_is_reached(seed: int) -> None:
    problem = make_problem(seed, units=4, resources=1)
    rng, switches = np.random.default_rng(0), LevelSwitches(problem)
    current = np.array(list_feasible(problem)[0])
    seen = {tuple(map(int, current))}
    for _ in range(6_000):
        child = switches.mutate(current, rng)
        current = current if child is None else child
        seen.add(tuple(map(int, current)))
    # One that leaves room to raise a unit need not be met; the others must all be.
    for choice in set(list_feasible(problem)) - seen:
        raised = [
            np.array([*choice[:u], f, *choice[u + 1 :]])
            for u in range(len(choice))
            for f in np.flatnonzero(problem.allowed[u])
            if problem.cost[0, u, f] > problem.cost[0, u, choice[u]]
        ]
        assert any(is_feasible(problem, other) for other in raised), choice


def test_bytes_left_over_are_spent_without_a_payment() -> None:
    problem = make_problem(3, resources=1, room=1.0)
    switches, rng = LevelSwitches(problem), np.random.default_rng(0)
    choice = np.where(problem.allowed, problem.cost[0], np.inf).argmin(axis=1)
    for _ in range(200):
        child = switches.mutate(choice, rng)
        use = [problem.cost[0, np.arange(5), c].sum() for c in (choice, child if child is not None else choice)]
        choice = child if child is not None and use[1] >= use[0] else choice
    np.testing.assert_array_equal(
        problem.cost[0, np.arange(5), choice], np.where(problem.allowed, problem.cost[0], -1.0).max(axis=1)
    )


def test_no_switch_where_there_is_one_choice_alone() -> None:
    problem = make_problem(0, room=0.0, resources=1)
    [only, *_] = list_feasible(problem)
    single = AllocationProblem(
        loss=problem.loss,
        cost=problem.cost,
        limit=problem.limit,
        allowed=np.eye(problem.n_formats, dtype=bool)[list(only)],
        resources=problem.resources,
    )
    assert LevelSwitches(single).mutate(np.array(only), np.random.default_rng(0)) is None
