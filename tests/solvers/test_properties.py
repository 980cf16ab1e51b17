"""Every solver against exhaustive search, on random small problems of the awkward kind.

Costs and losses are small integers or eighths, so that ties, zero costs and exactly met limits are common and sums
are exact.
"""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from solvers import (
    AllocationProblem,
    SolveParams,
    Termination,
    check_result,
    compute_dual_bound,
    compute_interaction,
    solve,
    solve_frontier,
    solve_least_cost,
)
from tests.solvers.cases import build_problem

TOLERANCE = 1e-9
FAST = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SLOW = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def problems(draw: st.DrawFn, *, n_resources: int = 1, n_sketch: int = 0) -> AllocationProblem:
    n_units, n_formats = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grain = draw(st.sampled_from([1.0, 0.125]))
    largest = draw(st.sampled_from([2, 8, 1000]))
    loss = grain * rng.integers(-largest // 2, largest, (n_units, n_formats))
    cost = grain * rng.integers(0, largest, (n_resources, n_units, n_formats))
    allowed = rng.random((n_units, n_formats)) < draw(st.sampled_from([0.6, 1.0]))
    allowed[np.arange(n_units), rng.integers(0, n_formats, n_units)] = True
    loss[~allowed] = np.nan
    cost[:, ~allowed] = np.nan
    least, most = np.nanmin(cost, axis=2).sum(axis=1), np.nanmax(cost, axis=2).sum(axis=1)
    tightness = draw(st.sampled_from([-0.1, 0.0, 0.3, 0.6, 1.0]))
    limit = grain * np.floor((least + tightness * (most - least)) / grain)
    sketch = rng.integers(-3, 4, (n_sketch, n_units, n_formats)).astype(float) if n_sketch else None
    return build_problem(
        loss=loss,
        cost=cost,
        limit=limit,
        allowed=allowed,
        sketch=sketch,
        interaction_scale=draw(st.sampled_from([0.5, 1])),
    )


def assert_agrees(problem: AllocationProblem, solver: str, params: SolveParams | None = None) -> None:
    oracle = solve(problem, solver="exhaustive")
    result = solve(problem, solver=solver, params=params)
    assert check_result(problem, result) == []
    if oracle.choice is None:
        assert oracle.termination is Termination.INFEASIBLE
        assert result.termination is Termination.INFEASIBLE
        return
    assert result.termination is Termination.OPTIMAL
    scale = max(1.0, abs(oracle.objective))
    assert abs(result.objective - oracle.objective) <= TOLERANCE * scale
    assert result.lower_bound <= oracle.objective + TOLERANCE * scale


@FAST
@given(problem=problems())
def test_knapsack_is_exact(problem: AllocationProblem) -> None:
    assert_agrees(problem, "knapsack")
    assert_agrees(problem, "knapsack", SolveParams(relative_gap_tolerance=0.0))


@SLOW
@given(problem=problems())
def test_milp_and_lagrangian_are_exact_on_one_limit(problem: AllocationProblem) -> None:
    assert_agrees(problem, "milp")
    assert_agrees(problem, "lagrangian")


@SLOW
@given(problem=problems(n_resources=3))
def test_milp_and_lagrangian_are_exact_on_three_limits(problem: AllocationProblem) -> None:
    assert_agrees(problem, "milp")
    assert_agrees(problem, "lagrangian")


@settings(parent=SLOW, max_examples=8)
@given(problem=problems(n_resources=2))
def test_cbc_is_exact(problem: AllocationProblem) -> None:
    assert_agrees(problem, "cbc")


@FAST
@given(problem=problems())
def test_shadow_price_proves_a_bound_that_everyone_can_check(problem: AllocationProblem) -> None:
    result = solve(problem, solver="knapsack")
    if result.choice is not None:
        bound = compute_dual_bound(problem, result.shadow_price)
        assert bound <= result.objective + TOLERANCE * max(1.0, abs(result.objective))


@pytest.mark.parametrize("n_resources", [1, 2])
def test_quadratic_bound_optimum_incumbent_are_in_order(n_resources: int) -> None:
    @settings(parent=SLOW, max_examples=25)
    @given(problem=problems(n_resources=n_resources, n_sketch=3))
    def check(problem: AllocationProblem) -> None:
        oracle = solve(problem, solver="exhaustive")
        result = solve(problem, solver="quadratic")
        assert check_result(problem, result) == []
        if oracle.choice is None:
            assert result.termination is Termination.INFEASIBLE
            return
        scale = max(1.0, abs(oracle.objective))
        assert result.lower_bound <= oracle.objective + TOLERANCE * scale
        assert oracle.objective <= result.objective + TOLERANCE * scale

    check()


@FAST
@given(problem=problems(n_sketch=3))
def test_exhaustive_agrees_with_plain_enumeration(problem: AllocationProblem) -> None:
    best = math.inf
    for choice in np.ndindex(*problem.loss.shape[1:] * problem.n_units):
        picked = np.array(choice)
        rows = np.arange(problem.n_units)
        if problem.allowed[rows, picked].all() and problem.cost[0, rows, picked].sum() <= problem.limit[0]:
            own = problem.loss[rows, picked].sum()
            best = min(best, own + problem.interaction_scale * compute_interaction(problem, picked))
    assert solve(problem, solver="exhaustive").objective == pytest.approx(best)


@FAST
@given(problem=problems())
def test_frontier_equals_single_solves(problem: AllocationProblem) -> None:
    previous = math.inf
    for result in solve_frontier(problem, n_points=5):
        assert result.choice is not None
        assert result.termination is Termination.OPTIMAL
        assert result.objective <= previous + TOLERANCE
        previous = result.objective
    assert previous == pytest.approx(np.nanmin(np.where(problem.allowed, problem.loss, np.nan), axis=1).sum())


@FAST
@given(problem=problems())
def test_least_cost_of_an_optimal_loss_is_within_its_limit(problem: AllocationProblem) -> None:
    optimum = solve(problem)
    if optimum.choice is None:
        return
    result = solve_least_cost(problem, resource="resource0", max_loss=optimum.objective)
    assert result.choice is not None
    assert result.termination is Termination.OPTIMAL
    assert result.objective <= optimum.use[0]
    assert result.use[0] <= optimum.objective + TOLERANCE
