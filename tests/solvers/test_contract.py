"""What every solver promises, on every case that it takes."""

from dataclasses import replace

import numpy as np
import pytest

from solvers import SOLVERS, SolveParams, SolveResult, Termination, check_result, is_feasible, solve
from tests.solvers.cases import CASES, HAWQ_CASES, Case, HawqCase, build_hawq_problem, group_hawq_layers

PAIRS = [(solver, case) for solver in SOLVERS for case in CASES if solver in case.solvers]
PAIR_IDS = [f"{solver}-{case.name}" for solver, case in PAIRS]
EXACT = ("knapsack", "lagrangian", "milp", "cbc", "exhaustive")
# CBC and HiGHS decide on scaled numbers with a tolerance of their own.
TOLERANCE = 1e-9


def assert_equal_results(first: SolveResult, second: SolveResult) -> None:
    np.testing.assert_array_equal(first.choice, second.choice)
    assert first.objective == second.objective
    assert first.lower_bound == second.lower_bound


@pytest.mark.parametrize(("solver", "case"), PAIRS, ids=PAIR_IDS)
def test_result_holds_and_meets_the_optimum(solver: str, case: Case) -> None:
    result = solve(case.problem, solver=solver)
    assert check_result(case.problem, result) == []
    if case.optimum is None:
        assert result.termination is Termination.INFEASIBLE
        assert result.choice is None
        assert result.resource_at_fault in case.problem.resources
        return
    assert result.choice is not None
    assert is_feasible(case.problem, result.choice)
    assert result.lower_bound <= case.optimum + TOLERANCE
    assert result.objective == pytest.approx(case.optimum, abs=TOLERANCE)
    if solver in EXACT or case.problem.is_separable:
        assert result.termination is Termination.OPTIMAL
        assert result.limit_hit is None


@pytest.mark.parametrize(("solver", "case"), PAIRS, ids=PAIR_IDS)
def test_result_is_the_same_again(solver: str, case: Case) -> None:
    params = SolveParams(seed=7)
    assert_equal_results(
        solve(case.problem, solver=solver, params=params), solve(case.problem, solver=solver, params=params)
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_auto_picks_a_solver_that_takes_the_case_and_says_why(case: Case) -> None:
    result = solve(case.problem)
    assert result.solver in case.solvers
    assert result.detail.startswith(f"{result.solver} (")
    assert check_result(case.problem, result) == []


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("hawq", HAWQ_CASES, ids=lambda case: f"{case.resource}-{case.limit}")
def test_hawq_resnet18_bit_maps(solver: str, hawq: HawqCase) -> None:
    result = solve(build_hawq_problem(hawq), solver=solver)
    assert result.choice is not None
    bits = [""] * 19
    for layers, chosen in zip(group_hawq_layers(), result.choice, strict=True):
        for layer in layers:
            bits[layer] = "48"[chosen]
    assert "".join(bits) == hawq.bits
    # Printed to five digits.
    assert result.objective == pytest.approx(hawq.omega, abs=5.1e-6)


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_without_a_limit_the_highest_precision_is_chosen(solver: str) -> None:
    """CLADO's own check of an allocation: losses that fall with the bits, no limit."""
    hawq = replace(build_hawq_problem(HAWQ_CASES[0]), limit=np.array([np.inf]))
    result = solve(hawq, solver=solver)
    assert result.choice is not None
    assert result.choice.tolist() == [1] * 16
    assert result.shadow_price[0] == 0.0 or solver == "exhaustive"
