"""The rules that people know: equal to their published examples, and what each is good and bad at."""

from dataclasses import replace

import numpy as np
import pytest

from solvers import SolveParams, Termination, check_result, make_instance, solve
from solvers.baselines.block_budgets import solve_block_budgets, weigh_expert_errors
from solvers.baselines.rank_threshold import assign_by_quantiles, assign_by_rank
from solvers.baselines.ratio_sweep import solve_ratio_sweep, sweep_ratios
from tests.solvers.cases import build_problem
from tests.solvers.test_contract import assert_equal_results

BASELINES = ("greedy", "annealing", "budget_grid", "rank_threshold")


@pytest.mark.parametrize("solver", BASELINES)
def test_one_limit_that_can_be_kept_always_has_a_plan(solver: str) -> None:
    problem = make_instance(n_units=60, n_formats=5, tightness=0.4)
    optimum, result = solve(problem), solve(problem, solver=solver)
    assert result.choice is not None
    assert optimum.objective <= result.objective
    uniform = min(float(problem.loss[:, f].sum()) for f in range(5) if problem.cost[0, :, f].sum() <= problem.limit[0])
    assert result.objective <= uniform


def test_greedy_is_wrong_where_the_last_step_blocks_the_budget() -> None:
    """Giving up the large unit costs less loss per byte; giving up the small one is enough."""
    problem = build_problem(loss=[[10.0, 0.0], [2.2, 0.0]], cost=[[[0, 10], [0, 2]]], limit=[10.0])
    assert solve(problem, solver="greedy").objective == 10.0
    assert solve(problem, solver="annealing").objective == 2.2


def test_annealing_improves_on_greedy_and_depends_on_its_seed_alone() -> None:
    problem = make_instance(n_units=60, n_formats=5, n_resources=2)
    results = [solve(problem, solver="annealing", params=SolveParams(seed=seed)) for seed in (1, 1, 2)]
    assert_equal_results(results[0], results[1])
    assert not np.array_equal(results[0].choice, results[2].choice)  # type: ignore[arg-type]
    assert results[0].objective < solve(problem, solver="greedy").objective


def test_annealing_stops_at_its_step_limit() -> None:
    problem = make_instance(n_units=60, n_formats=5)
    result = solve(problem, solver="annealing", params=SolveParams(node_limit=5))
    assert "5 steps" in result.detail
    assert result.limit_hit == "iterations"


def test_budget_grid_proves_the_optimum_where_costs_share_a_divisor() -> None:
    rng = np.random.default_rng(0)
    cost = 64.0 * rng.integers(1, 20, (1, 40, 4))
    problem = build_problem(loss=rng.random((40, 4)), cost=cost, limit=[cost.min(axis=2).sum() + 64.0 * 100 + 63])
    result = solve(problem, solver="budget_grid")
    assert result.termination is Termination.OPTIMAL
    assert result.objective == pytest.approx(solve(problem).objective, rel=1e-12)
    assert "as they are" in result.detail


def test_budget_grid_wastes_at_most_a_cell_per_unit() -> None:
    problem = make_instance(n_units=30, n_formats=4)
    result, optimum = solve(problem, solver="budget_grid"), solve(problem)
    assert "10000 cells, costs rounded up" in result.detail
    wasted = 30 * (problem.limit - problem.least_use) / 10_000
    smaller = solve(replace(problem, limit=problem.limit - wasted))
    assert optimum.objective <= result.objective <= smaller.objective


def test_layerwise_quant_of_forty_layers() -> None:
    """The published example: 30 layers of 4 bits and 10 of 2 bits are 3.5 bits on average."""
    sensitivity = np.random.default_rng(0).permutation(40).astype(np.float64)
    choice = assign_by_rank(sensitivity, n_low=10, low=0, high=1)
    assert np.array([2.0, 4.0])[choice].mean() == 3.5
    assert sensitivity[choice == 0].max() < sensitivity[choice == 1].min()


def test_shift_add_quantiles() -> None:
    sensitivity = np.random.default_rng(1).permutation(10).astype(np.float64)
    choice = assign_by_quantiles(sensitivity, np.array([0.0, 0.8, 0.2]))
    assert np.bincount(choice, minlength=3).tolist() == [0, 8, 2]
    assert set(sensitivity[choice == 2]) == {8.0, 9.0}


def test_rank_threshold_moves_the_fewest_units() -> None:
    problem = build_problem(loss=[[4.0, 0.0], [1.0, 0.0], [3.0, 0.0]], cost=[[[1, 2]] * 3], limit=[5.0])
    result = solve(problem, solver="rank_threshold")
    assert result.choice is not None
    assert result.choice.tolist() == [1, 0, 1]


SPLIT = make_instance(n_units=12, n_formats=4)
IN_FIRST = np.arange(12) < 5
WEIGHTS = np.full(12, 10.0)


def test_ratio_sweep_splits_by_the_published_formula() -> None:
    plans = sweep_ratios(SPLIT, SolveParams(), in_first=IN_FIRST, n_weights=WEIGHTS)
    r, total = 5 / 7, 1.0
    for plan in plans:
        # B_second = B (1 + r) / (k r + 1), B_first = k B_second, as bits per weight; shares are of all bits.
        second = total * (1 + r) / (plan.ratio * r + 1)
        assert plan.share == pytest.approx(plan.ratio * second * 5 / 12, rel=1e-12)
        if plan.choice is not None:
            used = SPLIT.cost[0, np.arange(12), plan.choice]
            assert used[IN_FIRST].sum() <= plan.share * SPLIT.limit[0] * (1 + 1e-12)
    assert any(plan.choice is not None for plan in plans)


def test_ratio_sweep_and_block_budgets_never_beat_the_common_budget() -> None:
    params, optimum = SolveParams(), solve(SPLIT)
    swept = solve_ratio_sweep(SPLIT, params, in_first=IN_FIRST, n_weights=WEIGHTS)
    # One block is the common budget.
    whole = solve_block_budgets(SPLIT, params, block=np.zeros(12, dtype=np.int64), n_weights=WEIGHTS)
    blocks = solve_block_budgets(SPLIT, params, block=np.arange(12) % 2, n_weights=WEIGHTS)
    for result in (swept, blocks):
        assert check_result(SPLIT, result) == []
        assert result.lower_bound <= optimum.objective <= result.objective
    assert whole.objective == pytest.approx(optimum.objective, rel=1e-9)


def test_a_block_below_its_least_use_has_no_plan() -> None:
    problem = build_problem(loss=[[1.0, 0.0], [1.0, 0.0]], cost=[[[9, 10], [1, 2]]], limit=[11.0])
    result = solve_block_budgets(problem, SolveParams(), block=np.array([0, 1]), n_weights=np.ones(2))
    assert result.termination is Termination.NO_SOLUTION_FOUND
    assert result.lower_bound <= 1.0
    halves = np.array([True, False])
    swept = sweep_ratios(problem, SolveParams(), in_first=halves, n_weights=np.ones(2), ratios=(1.0, 5.0))
    assert [plan.choice is None for plan in swept] == [True, False]


def test_expert_errors_are_weighed_as_published() -> None:
    error = np.array([[2.0, 1.0], [4.0, 3.0]])
    loss = weigh_expert_errors(error, frequency=np.array([1.0, 3.0]), routing_weight=np.array([4.0, 12.0]))
    # (1/4)^1 (1/4)^1.5 = 1/32 and (3/4)^2.5, errors squared.
    np.testing.assert_allclose(loss, [[4 / 32, 1 / 32], [16 * 0.75**2.5, 9 * 0.75**2.5]], rtol=1e-15)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="n_low must be from 0 to 3 units: got n_low=4"):
        assign_by_rank(np.zeros(3), n_low=4, low=0, high=1)
    with pytest.raises(ValueError, match="fractions must be at least 0 and sum to 1"):
        assign_by_quantiles(np.zeros(3), np.array([0.5, 0.6]))
    with pytest.raises(ValueError, match="in_first must leave units in both groups"):
        sweep_ratios(SPLIT, SolveParams(), in_first=np.ones(12, dtype=bool), n_weights=WEIGHTS)
    with pytest.raises(ValueError, match="n_weights and ratios must be above 0"):
        sweep_ratios(SPLIT, SolveParams(), in_first=IN_FIRST, n_weights=WEIGHTS, ratios=(0.0,))
    with pytest.raises(ValueError, match="n_weights must be above 0"):
        solve_block_budgets(SPLIT, SolveParams(), block=np.zeros(12, dtype=np.int64), n_weights=0 * WEIGHTS)
