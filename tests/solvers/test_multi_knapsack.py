"""Several limits: the dual against HiGHS, the search against HiGHS and when cut short, and limits that others imply."""

from dataclasses import replace

import numpy as np
import pytest

from solvers import (
    AllocationProblem,
    SolveParams,
    Termination,
    check_result,
    compute_dual_bound,
    make_instance,
    solve,
    solve_frontier,
)
from solvers import multi_knapsack as module
from solvers.dual import evaluate_dual, maximise_dual
from solvers.linear_program import minimise_fractions
from tests.solvers.cases import build_problem


def make_lumpy(*, n_resources: int, seed: int) -> AllocationProblem:
    """Returns an instance with one unit as large as a quarter of all, as embeddings are."""
    problem = make_instance(n_units=120, n_formats=6, n_resources=n_resources, seed=seed)
    cost, loss = problem.cost.copy(), problem.loss.copy()
    cost[:, 0] *= 0.3 * cost.sum(axis=1) / cost[:, 0]
    loss[0] *= 20.0
    limit = np.floor(0.5 * (cost.min(axis=2) + cost.max(axis=2)).sum(axis=1))
    return replace(problem, cost=np.floor(cost), loss=loss, limit=limit)


def make_parallel(limits: tuple[float, float]) -> AllocationProblem:
    """Returns a problem whose second cost is twice the first and 3 more per unit."""
    one = make_instance(n_units=40, n_formats=4)
    return replace(
        one,
        cost=np.concatenate([one.cost, 2.0 * one.cost + 3.0]),
        limit=np.array([one.limit[0] * limits[0], 2.0 * (one.limit[0] * limits[1] + 60.0)]),
        resources=("bytes", "twice"),
    )


@pytest.mark.parametrize("n_resources", [1, 2, 3, 4])
@pytest.mark.parametrize("tightness", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("n_units", [40, 3200])
def test_dual_is_the_optimum_of_the_linear_relaxation(n_resources: int, tightness: float, n_units: int) -> None:
    problem = make_instance(n_units=n_units, n_formats=5, n_resources=n_resources, tightness=tightness, seed=3)
    by_highs = minimise_fractions(problem.masked_loss, problem.masked_cost, problem.limit)
    assert by_highs is not None
    point = maximise_dual(problem.masked_loss, problem.masked_cost, problem.limit)
    # HiGHS' own tolerance is 1e-7 of the largest loss of a candidate.
    assert point.bound == pytest.approx(by_highs.objective, abs=1e-7 * float(problem.loss.max()))
    assert point.bound == evaluate_dual(problem.loss, problem.cost, problem.limit, point.price)[0]
    assert compute_dual_bound(problem, point.price) == pytest.approx(point.bound, rel=1e-12)
    assert 1 <= point.mixture.shape[0] <= n_resources + 1
    assert not point.proves_infeasible
    again = maximise_dual(problem.masked_loss, problem.masked_cost, problem.limit, near=point.price)
    assert again.bound == pytest.approx(point.bound, rel=1e-11)


def test_dual_proves_that_fractions_cannot_keep_the_limits() -> None:
    cost = np.array([[[0.0, 1.0]] * 3, [[1.0, 0.0]] * 3])
    loss = np.array([[1.0, 0.0]] * 3)
    assert maximise_dual(loss, cost, np.array([1.4999, 1.5])).proves_infeasible
    assert not maximise_dual(loss, cost, np.array([1.5, 1.5])).proves_infeasible


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_resources", [2, 3])
@pytest.mark.parametrize("lumpy", [False, True], ids=["even", "lumpy"])
def test_proves_what_highs_finds(n_resources: int, seed: int, lumpy: bool) -> None:
    make = make_lumpy if lumpy else lambda **shape: make_instance(n_units=60, n_formats=6, **shape)
    problem = make(n_resources=n_resources, seed=seed)
    result = solve(problem)
    assert result.solver == "multi_knapsack"
    assert result.termination is Termination.OPTIMAL
    assert check_result(problem, result) == []
    by_highs = solve(problem, solver="milp")
    assert result.objective == pytest.approx(by_highs.objective, rel=2e-9)
    assert result.lower_bound <= by_highs.objective
    assert compute_dual_bound(problem, result.shadow_price) <= result.lower_bound


@pytest.mark.parametrize(
    "params", [SolveParams(node_limit=200), SolveParams(time_limit_s=0.002)], ids=["nodes", "time"]
)
def test_cut_short_it_reports_the_limit_and_a_bound_that_holds(params: SolveParams) -> None:
    problem = make_instance(n_units=400, n_formats=6, n_resources=3)
    result, exact = solve(problem, params=params), solve(problem)
    assert exact.termination is Termination.OPTIMAL
    assert check_result(problem, result) == []
    assert result.termination is not Termination.OPTIMAL
    assert result.limit_hit == ("nodes" if params.node_limit == 200 else "time")
    assert compute_dual_bound(problem, result.shadow_price) <= result.lower_bound * (1 + 1e-12)
    assert result.lower_bound <= exact.objective <= result.objective


def test_what_the_search_does_not_finish_highs_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_STATES", 100)
    monkeypatch.setattr(module, "WIDE_STATES", 100)
    problem = make_lumpy(n_resources=2, seed=0)
    result = solve(problem)
    assert "the rest by HiGHS" in result.detail
    assert result.termination is Termination.OPTIMAL
    assert check_result(problem, result) == []
    monkeypatch.undo()
    assert result.objective == pytest.approx(solve(problem).objective, rel=2e-9)


def test_wide_tolerance_is_kept() -> None:
    problem = make_instance(n_units=200, n_formats=6, n_resources=3)
    exact = solve(problem)
    for gap in (1e-2, 1e-4, 5.0):
        result = solve(problem, params=SolveParams(relative_gap_tolerance=gap))
        assert check_result(problem, result, relative_gap_tolerance=gap) == []
        assert result.termination is Termination.OPTIMAL
        assert result.lower_bound <= exact.objective * (1 + 1e-9)


@pytest.mark.parametrize(("limits", "binding"), [((1.0, 1.1), (0,)), ((1.1, 1.0), (1,)), ((1.0, 1.0), (1,))])
def test_limit_that_another_implies_does_not_bind(limits: tuple[float, float], binding: tuple[int, ...]) -> None:
    problem = make_parallel(limits)
    assert problem.binding == binding
    result = solve(problem)
    assert result.solver == "knapsack"
    assert check_result(problem, result) == []
    assert result.shadow_price[1 - binding[0]] == 0.0
    assert result.objective == pytest.approx(solve(problem, solver="cbc").objective, rel=1e-9)


def test_costs_that_are_not_parallel_both_bind() -> None:
    problem = make_parallel((1.0, 1.01))
    cost = problem.cost.copy()
    cost[1, 0, -1] *= 3.0
    assert replace(problem, cost=cost).binding == (0, 1)


def test_frontier_sees_limits_that_only_larger_ones_set_free() -> None:
    """At the first limit the other one is implied, at the last it is the one that binds."""
    problem = make_parallel((0.8, 1.0))
    limits = problem.limit[0] * np.array([1.0, 1.2, 1.4, 2.0])
    for limit, result in zip(limits, solve_frontier(problem, resource="bytes", limits=limits), strict=True):
        at_limit = replace(problem, limit=np.array([limit, problem.limit[1]]))
        assert check_result(at_limit, result) == []
        assert result.objective == pytest.approx(solve(at_limit).objective, rel=2e-9)


def test_limits_in_whole_steps_are_lowered_to_them() -> None:
    """Bytes come in steps of 64; what is over is of no use, and no bound counts on it."""
    rng = np.random.default_rng(0)
    cost = np.stack([64.0 * rng.integers(1, 9, (30, 4)), rng.uniform(1, 9, (30, 4))])
    limit = 0.5 * (cost.min(axis=2) + cost.max(axis=2)).sum(axis=1)
    problem = build_problem(loss=rng.uniform(0, 1, (30, 4)), cost=cost, limit=limit)
    limit[0] = 64.0 * np.floor(limit[0] / 64.0)
    exact, over = (solve(replace(problem, limit=limit + [extra, 0.0])) for extra in (0.0, 63.0))
    assert exact.objective == over.objective
    np.testing.assert_array_equal(exact.shadow_price, over.shadow_price)
