"""What every solver promises, on every case that it takes; and what those promise that claim the optimum."""

from dataclasses import replace

import numpy as np
import pytest

from solvers import (
    SOLVERS,
    SolveParams,
    SolveResult,
    Termination,
    check_result,
    compute_dual_bound,
    compute_objective,
    compute_use,
    is_feasible,
    solve,
)
from solvers.check import rounding_allowance
from tests.solvers.cases import (
    CASES,
    EXACT,
    HAWQ_CASES,
    Case,
    HawqCase,
    build_hawq_problem,
    claims_optimum,
    group_hawq_layers,
    takes,
)

PAIRS = [(solver, case) for solver in SOLVERS for case in CASES if takes(solver, case.problem)]
SOLVABLE = [(solver, case) for solver, case in PAIRS if case.optimum is not None]
REFUSED = [(solver, case) for solver in SOLVERS for case in CASES if not takes(solver, case.problem)]
# CBC and HiGHS decide on scaled numbers with a tolerance of their own.
TOLERANCE = 1e-9


def name_pairs(pairs: list[tuple[str, Case]]) -> list[str]:
    return [f"{solver}-{case.name}" for solver, case in pairs]


def assert_equal_results(first: SolveResult, second: SolveResult) -> None:
    np.testing.assert_array_equal(first.choice, second.choice)
    assert first.objective == second.objective
    assert first.lower_bound == second.lower_bound
    assert first.termination is second.termination


def assert_truthful_end(solver: str, case: Case, result: SolveResult) -> None:
    """Checks that the termination is what choice and bound say, by nothing but these and the optimum."""
    if result.choice is None:
        assert result.lower_bound == np.inf or result.termination is Termination.NO_SOLUTION_FOUND
        assert case.optimum is None or len(case.problem.binding) > 1, "one limit that can be kept has a plan"
        return
    assert case.optimum is not None
    rounding = rounding_allowance(case.problem, result.choice)
    closed = result.objective - result.lower_bound <= 1e-9 * abs(result.objective) + rounding
    assert result.termination is (Termination.OPTIMAL if closed else Termination.FEASIBLE)
    assert (result.limit_hit is None) == closed


@pytest.mark.parametrize(("solver", "case"), PAIRS, ids=name_pairs(PAIRS))
def test_result_holds(solver: str, case: Case) -> None:
    problem, result = case.problem, solve(case.problem, solver=solver)
    assert check_result(problem, result) == []
    assert_truthful_end(solver, case, result)
    np.testing.assert_array_equal(result.least_use, problem.least_use)
    if case.optimum is None:
        assert result.termination in (Termination.INFEASIBLE, Termination.NO_SOLUTION_FOUND)
        return
    assert result.termination is not Termination.INFEASIBLE
    assert result.lower_bound <= case.optimum + TOLERANCE
    if result.choice is not None:
        assert is_feasible(problem, result.choice)
        assert result.objective == compute_objective(problem, result.choice)
        np.testing.assert_array_equal(result.use, compute_use(problem, result.choice))
        assert case.optimum <= result.objective + TOLERANCE
    if problem.is_separable and np.isfinite(result.shadow_price).all():
        assert compute_dual_bound(problem, result.shadow_price) <= result.lower_bound + TOLERANCE


@pytest.mark.parametrize(("solver", "case"), PAIRS, ids=name_pairs(PAIRS))
def test_result_is_the_same_again(solver: str, case: Case) -> None:
    first, second = (solve(case.problem, solver=solver, params=SolveParams(seed=7)) for _ in range(2))
    if first.choice is None:
        assert (second.choice, second.termination) == (None, first.termination)
    else:
        assert_equal_results(first, second)


@pytest.mark.parametrize(("solver", "case"), SOLVABLE, ids=name_pairs(SOLVABLE))
def test_start_at_the_optimum_is_never_lost(solver: str, case: Case) -> None:
    optimal = solve(case.problem, solver="exhaustive").choice
    assert optimal is not None
    result = solve(case.problem, solver=solver, params=SolveParams(starts=(optimal,)))
    assert check_result(case.problem, result) == []
    assert result.objective == pytest.approx(case.optimum, abs=TOLERANCE)


CLAIMS = [(solver, case) for solver, case in PAIRS if claims_optimum(solver, case.problem)]


@pytest.mark.parametrize(("solver", "case"), CLAIMS, ids=name_pairs(CLAIMS))
def test_claimed_optimum_is_met_and_infeasibility_proved(solver: str, case: Case) -> None:
    result = solve(case.problem, solver=solver)
    if case.optimum is None:
        assert result.termination is Termination.INFEASIBLE
        assert result.resource_at_fault in case.problem.resources
        return
    assert result.termination is Termination.OPTIMAL
    assert result.objective == pytest.approx(case.optimum, abs=TOLERANCE)


def test_quadratic_meets_the_planted_optimum() -> None:
    case = next(case for case in CASES if not case.problem.is_separable)
    assert solve(case.problem, solver="quadratic").objective == pytest.approx(case.optimum, abs=TOLERANCE)


@pytest.mark.parametrize(("solver", "case"), REFUSED, ids=name_pairs(REFUSED))
def test_what_a_solver_does_not_take_it_refuses(solver: str, case: Case) -> None:
    # A problem that cannot be kept one limit at a time is answered before the solver is asked.
    assert (case.problem.least_use <= case.problem.ceiling).all()
    with pytest.raises(ValueError, match=f"{solver} must be given (a problem without|at most one limit)"):
        solve(case.problem, solver=solver)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_auto_picks_a_solver_that_takes_the_case_and_says_why(case: Case) -> None:
    result = solve(case.problem)
    assert takes(result.solver, case.problem)
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
