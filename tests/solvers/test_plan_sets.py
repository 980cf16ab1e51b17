"""Diverse plans and regret, against enumeration."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from solvers import SolveParams, Termination, check_result, compute_objective, is_feasible, make_instance, solve
from solvers.diverse import solve_diverse
from solvers.robust import measure_regret

PROBLEM = make_instance(n_units=6, n_formats=3, seed=2)


@pytest.mark.parametrize("min_changes", [1, 2, 3])
@pytest.mark.parametrize("solver", ["auto", "lagrangian"])
def test_diverse_plans_are_those_of_enumeration(min_changes: int, solver: str) -> None:
    choices = [np.array(choice) for choice in itertools.product(range(3), repeat=6)]
    ranked = sorted(
        (compute_objective(PROBLEM, choice), choice.tolist()) for choice in choices if is_feasible(PROBLEM, choice)
    )
    most = 1.5 * ranked[0][0]
    expected: list[list[int]] = []
    for loss, choice in ranked:
        distances = [sum(a != b for a, b in zip(choice, other, strict=True)) for other in expected]
        if loss <= most and min(distances, default=6) >= min_changes:
            expected.append(choice)
    found = solve_diverse(PROBLEM, n_plans=50, relative_excess=0.5, min_changes=min_changes, solver=solver)
    assert found.complete
    assert len(expected) > 1
    assert [result.choice.tolist() for result in found.results if result.choice is not None] == expected
    for result in found.results:
        assert result.resources == ("resource0",)
        assert check_result(PROBLEM, result) == []


def test_diverse_stops_at_the_number_asked_for() -> None:
    found = solve_diverse(PROBLEM, n_plans=2, relative_excess=10.0, min_changes=1)
    assert len(found.results) == 2
    assert not found.complete


def test_diverse_plans_with_interactions_differ_and_keep_the_limit() -> None:
    problem = make_instance(n_units=12, n_formats=3, n_sketch=4)
    found = solve_diverse(problem, n_plans=4, relative_excess=3.0, min_changes=3)
    plans = [result.choice for result in found.results]
    assert len(plans) > 1
    for first, second in itertools.combinations(plans, 2):
        assert np.count_nonzero(first != second) >= 3
    for result in found.results:
        assert result.choice is not None
        assert is_feasible(problem, result.choice)
        assert result.objective <= 4.0 * found.results[0].objective


def test_diverse_of_an_infeasible_problem_is_its_one_result() -> None:
    found = solve_diverse(replace(PROBLEM, limit=np.zeros(1)), n_plans=3, relative_excess=0.1, min_changes=1)
    assert [result.termination for result in found.results] == [Termination.INFEASIBLE]
    assert found.complete


@pytest.mark.parametrize(
    ("n_plans", "relative_excess", "min_changes"), [(0, 0.1, 1), (1, -0.1, 1), (1, 0.1, 0), (1, 0.1, 7)]
)
def test_diverse_refuses(n_plans: int, relative_excess: float, min_changes: int) -> None:
    with pytest.raises(ValueError, match="n_plans must be at least 1, .* min_changes from 1 to 6"):
        solve_diverse(PROBLEM, n_plans=n_plans, relative_excess=relative_excess, min_changes=min_changes)


def test_regret_without_error_is_the_gap() -> None:
    best, worse = solve(PROBLEM), solve(PROBLEM, solver="rank_threshold")
    assert best.choice is not None
    assert worse.choice is not None
    regret = measure_regret(PROBLEM, np.zeros((6, 3)), (best.choice, worse.choice), n_draws=2)
    np.testing.assert_allclose(regret.least[0], 0.0, atol=1e-15)
    np.testing.assert_allclose(regret.mean, [best.gap, worse.objective - best.lower_bound], atol=1e-15)


def test_regret_is_that_of_enumeration_draw_by_draw() -> None:
    choices = [np.array(choice) for choice in itertools.product(range(3), repeat=6)]
    feasible = [choice for choice in choices if is_feasible(PROBLEM, choice)]
    std_error = 0.5 * PROBLEM.loss
    best = solve(PROBLEM).choice
    assert best is not None
    regret = measure_regret(PROBLEM, std_error, (best,), n_draws=5, seed=3)
    rng = np.random.default_rng(3)
    for d in range(5):
        drawn = replace(PROBLEM, loss=PROBLEM.loss + std_error * rng.standard_normal((6, 3)))
        optimum = min(compute_objective(drawn, choice) for choice in feasible)
        expected = compute_objective(drawn, best) - optimum
        assert regret.least[0, d] == pytest.approx(expected, abs=1e-12)
        assert regret.most[0, d] == pytest.approx(expected, abs=1e-9)
    assert regret.most.max() > 0
    assert regret.quantile(1.0)[0] == regret.most.max()
    assert regret.quantile(0.5)[0] <= regret.quantile(0.9)[0]


def test_regret_of_two_equal_plans_is_its_known_expectation() -> None:
    """One of two plans of equal predicted loss has a loss with a normal error: both regret E max(0, e)."""
    problem = replace(
        make_instance(n_units=2, n_formats=3),
        loss=np.array([[3.0, 1.0, 1.0], [0.0, 9.0, 9.0]]),
        cost=np.array([[[1.0, 2.0, 2.0], [1.0, 2.0, 2.0]]]),
        limit=np.array([3.0]),
    )
    std_error = np.array([[0.0, 0.8, 0.0], [0.0, 0.0, 0.0]])
    plans = (np.array([1, 0]), np.array([2, 0]))
    regret = measure_regret(problem, std_error, plans, n_draws=200)
    # E max(0, e) = 0.8 / sqrt(2 pi); the mean of 200 draws is within 4 of its standard errors, 0.033.
    np.testing.assert_allclose(regret.mean, 0.8 / np.sqrt(2 * np.pi), atol=0.13)
    again = measure_regret(problem, std_error, plans, n_draws=200)
    np.testing.assert_array_equal(again.most, regret.most)


def test_regret_refuses_what_does_not_fit() -> None:
    plan = np.zeros(6, dtype=np.int64)
    with pytest.raises(ValueError, match=r"std_error must have shape \(6, 3\): got \(6, 2\)"):
        measure_regret(PROBLEM, np.zeros((6, 2)), (plan,))
    with pytest.raises(ValueError, match="std_error must be finite and at least 0"):
        measure_regret(PROBLEM, np.full((6, 3), -1.0), (plan,))
    with pytest.raises(ValueError, match="plans and n_draws must be at least 1: got 0 plans"):
        measure_regret(PROBLEM, np.zeros((6, 3)), ())
    with pytest.raises(ValueError, match="plans must keep every limit and mask: got an infeasible one at index 1"):
        measure_regret(PROBLEM, np.zeros((6, 3)), (plan, plan + 2))
    with pytest.raises(ValueError, match="starts must hold one format index per unit"):
        measure_regret(PROBLEM, np.zeros((6, 3)), (plan[:3],), params=SolveParams())
