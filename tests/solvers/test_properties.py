"""Every solver against exhaustive search, on random small problems of the awkward kind.

Costs and losses are small integers or eighths, so that ties, zero costs and exactly met limits are common and sums
are exact.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from solvers import (
    SOLVERS,
    AllocationProblem,
    SolveParams,
    Termination,
    check_result,
    compute_dual_bound,
    compute_interaction,
    compute_objective,
    is_feasible,
    list_efficient,
    solve,
    solve_frontier,
    solve_least_cost,
    solve_tied,
)
from tests.solvers.cases import INTERACTING, ONE_LIMIT_ONLY, build_problem, claims_optimum

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
    if n_resources > 1 and draw(st.booleans()):
        # Parallel but for a part that every choice has: one limit then implies the other.
        cost[-1] = draw(st.sampled_from([0.5, 1.0, 3.0])) * cost[0] + rng.integers(0, 2, (n_units, 1))
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


def assert_in_order(problem: AllocationProblem, solver: str, params: SolveParams) -> None:
    """Checks bound <= optimum <= incumbent against exhaustive search, and the optimum where it is claimed."""
    oracle = solve(problem, solver="exhaustive")
    result = solve(problem, solver=solver, params=params)
    assert check_result(problem, result, relative_gap_tolerance=params.relative_gap_tolerance) == []
    cut_short = params.node_limit < SolveParams().node_limit
    claimed = claims_optimum(solver, problem) and not cut_short
    if oracle.choice is None:
        assert oracle.termination is Termination.INFEASIBLE
        assert result.choice is None
        assert result.termination is Termination.INFEASIBLE or not claimed
        return
    allowance = TOLERANCE * max(1.0, abs(oracle.objective))
    assert result.termination is not Termination.INFEASIBLE
    assert result.lower_bound <= oracle.objective + allowance
    assert oracle.objective <= result.objective + allowance
    provable = problem.is_separable or result.sketch_sum is not None
    if provable and result.choice is not None and np.isfinite(result.shadow_price).all():
        repeated = compute_dual_bound(problem, result.shadow_price, sketch_sum=result.sketch_sum)
        assert repeated <= result.lower_bound + allowance
    if claimed:
        assert result.termination is Termination.OPTIMAL
        assert result.objective <= oracle.objective + allowance


COUNTS = {"knapsack": 150, "multi_knapsack": 150, "cbc": 8, "pulp_highs": 12}
SHAPES = {"one_limit": (1, 0), "three_limits": (3, 0), "interactions": (1, 3), "interactions_two_limits": (2, 3)}
KINDS = [
    (solver, shape)
    for solver in SOLVERS
    for shape, (n_resources, n_sketch) in SHAPES.items()
    if (solver in INTERACTING if n_sketch else n_resources == 1 or solver not in ONE_LIMIT_ONLY)
]
SHAPES |= {"two_limits": (2, 0), "four_limits": (4, 0)}
KINDS += [("multi_knapsack", shape) for shape in ("two_limits", "four_limits")]


@pytest.mark.parametrize(("solver", "shape"), KINDS, ids=[f"{solver}-{shape}" for solver, shape in KINDS])
def test_bound_optimum_incumbent_are_in_order(solver: str, shape: str) -> None:
    n_resources, n_sketch = SHAPES[shape]

    @settings(parent=SLOW, max_examples=COUNTS.get(solver, 20))
    @given(problem=problems(n_resources=n_resources, n_sketch=n_sketch), node_limit=st.sampled_from([1, None]))
    def check(problem: AllocationProblem, node_limit: int | None) -> None:
        params = SolveParams() if node_limit is None else SolveParams(node_limit=node_limit)
        assert_in_order(problem, solver, params)

    check()


@FAST
@given(problem=problems())
def test_knapsack_proves_the_optimum_to_rounding(problem: AllocationProblem) -> None:
    assert_in_order(problem, "knapsack", SolveParams(relative_gap_tolerance=0.0))


@FAST
@given(problem=problems(n_resources=2))
def test_multi_knapsack_proves_the_optimum_to_rounding(problem: AllocationProblem) -> None:
    assert_in_order(problem, "multi_knapsack", SolveParams(relative_gap_tolerance=0.0))


@FAST
@given(problem=problems())
def test_shadow_price_proves_a_bound_that_everyone_can_check(problem: AllocationProblem) -> None:
    result = solve(problem, solver="knapsack")
    if result.choice is not None:
        bound = compute_dual_bound(problem, result.shadow_price)
        assert bound <= result.objective + TOLERANCE * max(1.0, abs(result.objective))


@FAST
@given(problem=problems(n_sketch=3), seed=st.integers(0, 99))
def test_any_prices_and_sketch_sum_prove_a_bound(problem: AllocationProblem, seed: int) -> None:
    oracle = solve(problem, solver="exhaustive")
    assume(oracle.choice is not None)
    rng = np.random.default_rng(seed)
    bound = compute_dual_bound(problem, rng.exponential(1.0, 1), sketch_sum=rng.normal(0.0, 3.0, 3))
    assert bound <= oracle.objective + TOLERANCE * max(1.0, abs(oracle.objective))


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


@SLOW
@given(problem=problems(n_sketch=2))
def test_tied_optimum_is_the_best_of_all_choices_that_agree(problem: AllocationProblem) -> None:
    tie = tuple(range(0, problem.n_units, 2))
    common = problem.allowed[list(tie)].all(axis=0)
    assume(common.any())
    best, rows = math.inf, np.arange(problem.n_units)
    for shared in np.flatnonzero(common):
        for others in itertools.product(range(problem.n_formats), repeat=problem.n_units - len(tie)):
            choice = np.full(problem.n_units, shared)
            choice[1::2] = others
            if problem.allowed[rows, choice].all() and is_feasible(problem, choice):
                best = min(best, compute_objective(problem, choice))
    result = solve_tied(problem, (tie,), solver="exhaustive")
    assert result.objective == pytest.approx(best, abs=TOLERANCE * max(1.0, abs(best)) if math.isfinite(best) else 0)


@SLOW
@given(problem=problems(n_resources=2))
def test_efficient_points_are_the_undominated_ones(problem: AllocationProblem) -> None:
    results = solve_frontier(problem, resource="resource1", n_points=6)
    points = {(result.use[1], result.objective) for result in results if result.choice is not None}
    undominated = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    efficient = list_efficient(results, resource="resource1")
    assert [(result.use[1], result.objective) for result in efficient] == sorted(undominated)


@FAST
@given(problem=problems())
def test_frontier_equals_single_solves(problem: AllocationProblem) -> None:
    previous = math.inf
    results = solve_frontier(problem, n_points=5)
    for limit, result in zip(np.linspace(problem.least_use[0], results[-1].use[0], 5), results, strict=True):
        single = solve(replace(problem, limit=np.array([limit])), solver="exhaustive")
        assert result.objective == pytest.approx(single.objective, abs=TOLERANCE * max(1.0, abs(single.objective)))
        assert result.choice is not None
        assert result.termination is Termination.OPTIMAL
        assert result.objective <= previous + TOLERANCE
        previous = result.objective
    assert previous == pytest.approx(np.nanmin(np.where(problem.allowed, problem.loss, np.nan), axis=1).sum())


@FAST
@given(problem=problems(), part=st.sampled_from([-0.1, 0.0, 0.3, 0.7]))
def test_least_cost_is_that_of_enumeration(problem: AllocationProblem, part: float) -> None:
    least = float(problem.masked_loss.min(axis=1).sum())
    most = float(np.where(problem.allowed, problem.loss, -np.inf).max(axis=1).sum())
    max_loss = math.floor(8 * (least + part * (most - least))) / 8
    result = solve_least_cost(problem, resource="resource0", max_loss=max_loss)
    rows, best = np.arange(problem.n_units), math.inf
    for choice in itertools.product(*(np.flatnonzero(row) for row in problem.allowed)):
        if problem.loss[rows, choice].sum() <= max_loss:
            best = min(best, float(problem.cost[0, rows, choice].sum()))
    assert result.objective == best
    assert result.lower_bound <= best
    assert (result.termination is Termination.INFEASIBLE) == math.isinf(best)


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
