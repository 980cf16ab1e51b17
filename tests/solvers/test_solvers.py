"""What is special to one solver, and to results that are false."""

from dataclasses import replace

import numpy as np
import pytest

from solvers import (
    SolveParams,
    SolverFailure,
    Termination,
    TrustRegion,
    check_result,
    compute_dual_bound,
    compute_objective,
    list_efficient,
    make_instance,
    solve,
    solve_frontier,
    solve_least_cost,
)
from solvers.certification import certify
from solvers.convex_hull import build_hull, relax
from solvers.problem import IntArray
from solvers.result import Answer
from tests.solvers.cases import build_planted_interaction, build_problem

ONE = build_problem(loss=[[1.0, 0.0], [2.0, 0.0]], cost=[[[1, 2], [1, 2]]], limit=[3.0])
TWO = make_instance(n_units=12, n_formats=4, n_resources=2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tightness", [0.02, 0.5, 0.95])
def test_knapsack_proves_a_dense_model(seed: int, tightness: float) -> None:
    problem = make_instance(n_units=224, n_formats=6, seed=seed, tightness=tightness)
    result = solve(problem, params=SolveParams(relative_gap_tolerance=0.0))
    assert result.termination is Termination.OPTIMAL
    assert check_result(problem, result, relative_gap_tolerance=0.0) == []
    by_highs = solve(problem, solver="milp")
    assert result.objective == pytest.approx(by_highs.objective, rel=1e-9)


def test_knapsack_certifies_a_mixture_of_experts() -> None:
    problem = make_instance(n_units=44_544, n_formats=6)
    result = solve(problem)
    assert result.relative_gap <= 1e-6
    assert check_result(problem, result) == []
    assert compute_dual_bound(problem, result.shadow_price) <= result.objective


def test_knapsack_uses_the_common_divisor_of_sizes() -> None:
    """10,000 equal units: the limit is rounded down to a multiple of the step, which closes the gap at once."""
    problem = build_problem(
        loss=[[1.0, 0.0]] * 10_000, cost=[[[64, 128]] * 10_000], limit=[64 * 10_000 + 64 * 5000 + 63]
    )
    result = solve(problem)
    assert result.termination is Termination.OPTIMAL
    assert result.objective == 5000.0


def test_knapsack_reports_the_limit_it_hit() -> None:
    problem = make_instance(n_units=400, n_formats=6)
    result = solve(problem, params=SolveParams(node_limit=1, relative_gap_tolerance=0.0))
    assert result.termination is Termination.FEASIBLE
    assert result.limit_hit == "nodes"
    exact = solve(problem, params=SolveParams(relative_gap_tolerance=0.0))
    assert result.lower_bound <= exact.objective <= result.objective
    assert check_result(problem, result) == []


def test_hull_keeps_only_convex_points() -> None:
    hull = build_hull(np.array([[10.0, 9.0, 0.0, 1.0]]), np.array([[0.0, 5.0, 10.0, 20.0]]))
    assert hull.vertices.tolist() == [[0, 2]]
    assert hull.slope.tolist() == [-1.0]
    assert hull.cost_quantum == 5.0
    relaxed = relax(hull, 7.0)
    assert (relaxed.price, relaxed.slack, relaxed.break_format) == (1.0, 5.0, 2)


@pytest.mark.parametrize("solver", ["milp", "lagrangian", "pulp_highs"])
def test_several_limits_report_incumbent_and_bound_when_cut_short(solver: str) -> None:
    problem = make_instance(n_units=2000, n_formats=6, n_resources=3)
    result = solve(problem, solver=solver, params=SolveParams(time_limit_s=0.3, relative_gap_tolerance=0.0))
    assert check_result(problem, result) == []
    if result.termination is not Termination.OPTIMAL:
        assert result.limit_hit is not None
    assert np.isfinite(result.lower_bound)
    assert compute_dual_bound(problem, result.shadow_price) <= result.lower_bound + 1e-9


def test_lagrangian_certifies_three_limits_at_scale() -> None:
    problem = make_instance(n_units=8000, n_formats=6, n_resources=3)
    result = solve(problem, solver="lagrangian", params=SolveParams(relative_gap_tolerance=1e-4))
    assert result.termination is Termination.OPTIMAL
    assert result.relative_gap <= 1e-4
    assert check_result(problem, result, relative_gap_tolerance=1e-4) == []


def test_start_is_never_lost() -> None:
    problem = make_instance(n_units=300, n_formats=6)
    optimum = solve(problem, params=SolveParams(relative_gap_tolerance=0.0))
    assert optimum.choice is not None
    params = SolveParams(relative_gap_tolerance=0.1, starts=(optimum.choice,))
    assert solve(problem, params=params).objective <= optimum.objective


def test_quadratic_finds_the_planted_interaction() -> None:
    problem = build_planted_interaction()
    result = solve(problem)
    assert result.solver == "quadratic"
    assert result.choice is not None
    assert result.choice.tolist() == [1, 1, 0, 0]
    assert compute_objective(problem, np.array([0, 0, 1, 1])) == 2.0


@pytest.mark.parametrize("seed", range(2))
def test_quadratic_beats_the_diagonal_and_reports_its_gap(seed: int) -> None:
    problem = make_instance(n_units=224, n_formats=6, n_sketch=128, seed=seed)
    diagonal = solve(replace(problem, sketch=None))
    assert diagonal.choice is not None
    result = solve(problem)
    assert check_result(problem, result) == []
    assert result.objective < compute_objective(problem, diagonal.choice)
    assert 0.0 < result.relative_gap < 0.05
    assert result.sketch_sum is not None
    repeated = compute_dual_bound(problem, result.shadow_price, sketch_sum=result.sketch_sum)
    assert repeated <= result.lower_bound * (1 + 1e-12)
    assert result.lower_bound - repeated <= 0.1 * result.gap


def test_quadratic_without_interactions_is_exact() -> None:
    problem = replace(make_instance(n_units=20, n_formats=4, n_sketch=4), interaction_scale=0.0)
    result = solve(problem, solver="quadratic")
    assert result.termination is Termination.OPTIMAL
    assert result.objective == pytest.approx(solve(problem, solver="knapsack").objective, rel=1e-12)


def test_validation_sketch_keeps_only_gains_that_hold() -> None:
    problem = make_instance(n_units=60, n_formats=4, n_sketch=8)
    unseen = make_instance(n_units=60, n_formats=4, n_sketch=8, seed=1).sketch
    assert problem.sketch is not None
    assert unseen is not None
    second = np.ascontiguousarray(0.5 * problem.sketch + 0.5 * unseen)
    diagonal = solve(replace(problem, sketch=None))
    assert diagonal.choice is not None
    held_out = replace(problem, sketch=second)
    free, bound = solve(problem), solve(problem, params=SolveParams(validation_sketch=second))
    assert free.choice is not None
    assert bound.choice is not None
    assert bound.objective <= compute_objective(problem, diagonal.choice)
    assert compute_objective(held_out, bound.choice) <= compute_objective(held_out, diagonal.choice)
    assert compute_objective(held_out, bound.choice) < compute_objective(held_out, free.choice)


def test_start_that_validation_rejects_is_only_a_place_to_search_from() -> None:
    """The free optimum is better by the problem's own sketch, and worse than the diagonal by the held-out one."""
    problem = make_instance(n_units=60, n_formats=4, n_sketch=8)
    second = make_instance(n_units=60, n_formats=4, n_sketch=8, seed=1).sketch
    diagonal, free = solve(replace(problem, sketch=None)).choice, solve(problem).choice
    assert diagonal is not None
    assert free is not None
    held_out = replace(problem, sketch=second)
    assert compute_objective(held_out, free) > compute_objective(held_out, diagonal)
    result = solve(problem, params=SolveParams(validation_sketch=second, starts=(free,)))
    assert result.choice is not None
    assert compute_objective(held_out, result.choice) <= compute_objective(held_out, diagonal)
    assert result.objective <= compute_objective(problem, diagonal)


@pytest.mark.parametrize("n_sketch", [0, 4])
@pytest.mark.parametrize("max_changes", [0, 1, 3])
def test_trust_region_bounds_the_changes(n_sketch: int, max_changes: int) -> None:
    problem = make_instance(n_units=8, n_formats=3, n_sketch=n_sketch)
    reference = np.zeros(8, dtype=np.int64)
    params = SolveParams(trust_region=TrustRegion(reference=reference, max_changes=max_changes))
    result, oracle = solve(problem, params=params), solve(problem, solver="exhaustive", params=params)
    assert result.choice is not None
    assert np.count_nonzero(result.choice) <= max_changes
    assert result.use.shape == (1,)
    assert check_result(problem, result) == []
    assert oracle.objective <= result.objective + 1e-12
    if not n_sketch:
        assert result.objective == pytest.approx(oracle.objective)


def test_infeasible_names_the_resource_and_the_least_use() -> None:
    problem = replace(TWO, limit=TWO.least_use * np.array([2.0, 0.5]))
    result = solve(problem)
    assert result.termination is Termination.INFEASIBLE
    assert result.resource_at_fault == "resource1"
    np.testing.assert_allclose(result.least_use, TWO.least_use)
    assert np.isinf(result.objective)


def test_frontier_shares_the_hull_and_matches_single_solves() -> None:
    problem = make_instance(n_units=224, n_formats=6)
    results = solve_frontier(problem, n_points=12)
    assert [result.termination for result in results] == [Termination.OPTIMAL] * 12
    for result, limit in zip(results, np.linspace(problem.least_use[0], results[-1].use[0], 12), strict=True):
        single = solve(replace(problem, limit=np.array([limit])))
        assert result.objective == pytest.approx(single.objective, rel=2e-9)
    prices = [result.shadow_price[0] for result in results]
    assert prices == sorted(prices, reverse=True)
    assert prices[-1] == 0.0


def test_frontier_sweeps_one_of_several_resources() -> None:
    results = solve_frontier(TWO, resource="resource1", limits=TWO.limit[1] * np.array([0.01, 1.0, 2.0]))
    assert results[0].termination is Termination.INFEASIBLE
    assert results[2].objective <= results[1].objective
    assert results[1].objective == pytest.approx(solve(TWO).objective)


def test_frontier_starts_from_the_limits_below() -> None:
    """With few sketches the search alone is erratic: solved one by one, larger limits do worse here and there."""
    problem = make_instance(n_units=24, n_formats=4, n_sketch=6, seed=2)
    limits = problem.limit[0] * np.linspace(1.1, 0.9, 9)
    results = solve_frontier(problem, limits=limits)
    objectives = [result.objective for result in results]
    assert objectives == sorted(objectives)
    for result, limit in zip(results, limits, strict=True):
        assert check_result(replace(problem, limit=np.array([limit])), result) == []


def test_efficient_of_nothing_is_nothing() -> None:
    assert list_efficient(()) == ()
    assert list_efficient(solve_frontier(ONE, limits=np.array([0.0]))) == ()
    with pytest.raises(ValueError, match="resource must be one of resource0, resource1: got resource=None"):
        list_efficient(solve_frontier(TWO, resource="resource1", n_points=2))


def test_shadow_price_is_what_one_more_unit_of_the_limit_buys() -> None:
    """At scale the frontier is smooth: its slope between points lies between their prices."""
    results = solve_frontier(make_instance(n_units=3000, n_formats=6), n_points=8)
    for low, high in zip(results[:-1], results[1:], strict=True):
        slope = (low.objective - high.objective) / (high.use[0] - low.use[0])
        assert high.shadow_price[0] * 0.999 <= slope <= low.shadow_price[0] * 1.001


def test_least_cost_reports_cost_and_loss() -> None:
    result = solve_least_cost(ONE, resource="resource0", max_loss=1.0)
    assert result.resources == ("loss",)
    assert (result.objective, result.use[0], result.least_use[0]) == (3.0, 1.0, 0.0)
    unreachable = solve_least_cost(ONE, resource="resource0", max_loss=-0.5)
    assert unreachable.termination is Termination.INFEASIBLE
    assert unreachable.resource_at_fault == "loss"


def test_least_cost_keeps_the_other_limits() -> None:
    result = solve_least_cost(TWO, resource="resource0", max_loss=2 * solve(TWO).objective)
    assert result.resources == ("loss", "resource1")
    assert result.use[1] <= TWO.limit[1]
    assert result.objective < solve(TWO).use[0]


@pytest.mark.parametrize("change", ["choice", "objective", "use", "lower_bound", "termination"])
def test_check_result_sees_every_tampering(change: str) -> None:
    result = solve(ONE)
    assert result.choice is not None
    assert check_result(ONE, result) == []
    tampered = {
        "choice": replace(result, choice=np.array([1, 1])),
        "objective": replace(result, objective=result.objective - 0.1, lower_bound=-1.0),
        "use": replace(result, use=result.use - 1),
        "lower_bound": replace(result, lower_bound=result.objective + 0.1),
        "termination": replace(result, lower_bound=result.objective - 0.1),
    }[change]
    assert check_result(ONE, tampered)


def test_check_result_sees_forbidden_and_malformed_choices() -> None:
    masked = replace(ONE, allowed=np.array([[True, False], [True, True]]))
    result = solve(masked)
    assert any("not allowed" in text for text in check_result(masked, replace(result, choice=np.array([1, 0]))))
    assert any("format indices" in text for text in check_result(masked, replace(result, choice=np.array([0, 2]))))
    nothing = replace(solve(replace(ONE, limit=np.zeros(1))), termination=Termination.OPTIMAL)
    assert any("without a choice" in text for text in check_result(ONE, nothing))


def make_answer(choice: IntArray | None, *, lower_bound: float = 0.0, fault: str | None = None) -> Answer:
    return Answer(
        choice=choice,
        lower_bound=lower_bound,
        shadow_price=None,
        limit_hit=None,
        detail="written by hand",
        resource_at_fault=fault,
    )


def test_false_answers_do_not_survive() -> None:
    with pytest.raises(SolverFailure, match="breaks a limit or a mask"):
        certify(ONE, SolveParams(), make_answer(np.array([1, 1])), solver="false")
    with pytest.raises(SolverFailure, match="claims lower_bound=5.0, above a feasible objective 3.0"):
        certify(ONE, SolveParams(), make_answer(np.array([0, 0]), lower_bound=5.0), solver="false")
    with pytest.raises(SolverFailure, match="claims that no choice keeps every limit, but a start does"):
        params = SolveParams(starts=(np.array([0, 0]),))
        certify(ONE, params, make_answer(None, fault="resource0"), solver="false")
    honest = certify(ONE, SolveParams(), make_answer(None), solver="tired")
    assert honest.termination is Termination.NO_SOLUTION_FOUND
    assert check_result(ONE, honest) == []
