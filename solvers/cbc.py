"""Several budgets by CBC through PuLP: the backend people know, for comparison.

The same binary program as `milp`. PuLP is imported when asked for; version 3 (before 4) brings CBC along. CBC
returns no bound for a run cut short, so the bound then is the Lagrangian one; for a run that CBC calls
optimal it is the objective less the gap that CBC was allowed.

Complexity: exponential at worst; thousands of candidates in seconds to minutes.
Source: J. Forrest and R. Lougee-Heimer, "CBC user guide", INFORMS TutORials (2005).
"""

import importlib
import warnings
from typing import Any

import numpy as np

from solvers.certification import run_certified
from solvers.dual import maximise_dual
from solvers.knapsack import check_separable
from solvers.milp import LIMIT_SCALE, LOSS_RANGE, report_joint_infeasibility, scale_gap
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, FloatArray, IntArray
from solvers.result import Answer, SolveResult

ROW_MARGIN = 1e-6
"""CBC's row tolerance, relative to LIMIT_SCALE; limits are drawn in by it when a choice exceeds them."""


def solve_cbc(problem: AllocationProblem, params: SolveParams) -> SolveResult:
    """Returns the optimum, or incumbent and bound, by CBC.

    Raises:
        ValueError: the problem has interactions.
        ImportError: PuLP is not installed.
    """
    return run_certified(problem, params, solver="cbc", search=search_cbc)


def search_cbc(problem: AllocationProblem, params: SolveParams) -> Answer:
    """Returns the answer of the cbc solver."""
    check_separable(problem, "cbc")
    pulp = _import_pulp()
    binding = list(problem.binding)
    loss, cost, limit = problem.masked_loss, problem.masked_cost[binding], problem.target[binding]
    dual = maximise_dual(loss, cost, limit)
    choice, bound, limit_hit = None, dual.bound, None
    gap = scale_gap(params.relative_gap_tolerance, loss, dual.bound)
    for margin in (0.0, ROW_MARGIN):
        found, optimal, infeasible = _run_cbc(pulp, loss, cost, limit - margin * np.abs(limit), gap, params)
        if infeasible and margin == 0.0:
            detail = "CBC proved that no choice keeps every limit"
            return report_joint_infeasibility(problem, dual.price, detail)
        limit_hit = limit_hit or (None if optimal or infeasible else "time")
        if found is not None and np.all(cost[:, np.arange(found.size), found].sum(axis=1) <= limit):
            choice = found
            # The optimum under limits drawn in is no bound for the limits given.
            bound = max(bound, _bound_optimum(loss, found, gap) if optimal and margin == 0.0 else bound)
            break
    shadow_price = np.zeros(len(problem.resources))
    shadow_price[binding] = dual.price
    return Answer(
        choice=choice,
        lower_bound=bound,
        shadow_price=shadow_price,
        limit_hit=limit_hit,
        detail=f"CBC over {int(problem.allowed.sum())} binary variables and {len(binding)} limits",
    )


def _bound_optimum(loss: FloatArray, choice: IntArray, relative_gap: float) -> float:
    """Returns the bound that CBC's claim of optimality implies: its gap is relative to the shifted objective."""
    objective = float(loss[np.arange(choice.size), choice].sum())
    return objective - relative_gap * (objective - float(loss.min(axis=1).sum()))


def _import_pulp() -> Any:
    try:
        return importlib.import_module("pulp")
    except ImportError as error:
        msg = "solver 'cbc' needs PuLP: it is not installed. Run pip install 'pulp<4', or use solver 'milp'."
        raise ImportError(msg) from error


def _run_cbc(
    pulp: Any, loss: FloatArray, cost: FloatArray, limit: FloatArray, relative_gap: float, params: SolveParams
) -> tuple[IntArray | None, bool, bool]:
    """Returns CBC's choice or None, whether it claims the optimum, and whether it claims infeasibility."""
    unit, formats = np.nonzero(np.isfinite(loss))
    with warnings.catch_warnings():
        # PuLP 3 announces version 4, which is ruled out by the requirement pulp<4.
        warnings.simplefilter("ignore", DeprecationWarning)
        program, variables = _build_program(pulp, loss, cost, limit)
        backend = pulp.PULP_CBC_CMD(msg=False, threads=1, gapRel=relative_gap, timeLimit=params.time_limit_s)
        program.solve(backend)
    if program.status == pulp.LpStatusInfeasible:
        return None, False, True
    if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None, False, False
    weights = np.full(loss.shape, -1.0)
    weights[unit, formats] = [variable.value() or 0.0 for variable in variables]
    return weights.argmax(axis=1), program.sol_status == pulp.LpSolutionOptimal, False


def _build_program(pulp: Any, loss: FloatArray, cost: FloatArray, limit: FloatArray) -> tuple[Any, list[Any]]:
    """Returns the PuLP program and its variables, one per allowed candidate in row order."""
    unit, formats = np.nonzero(np.isfinite(loss))
    shifted = loss[unit, formats] - loss.min(axis=1)[unit]
    scale = LOSS_RANGE / shifted.max() if shifted.max() > 0 else 1.0
    variables = [pulp.LpVariable(f"x{i}", cat="Binary") for i in range(unit.size)]
    program = pulp.LpProblem("allocation", pulp.LpMinimize)
    program += _sum_terms(pulp, variables, shifted * scale)
    ends = np.searchsorted(unit, np.arange(loss.shape[0] + 1))
    for first, last in zip(ends[:-1], ends[1:], strict=True):
        program += pulp.lpSum(variables[first:last]) == 1
    for r in range(limit.size):
        terms = cost[r, unit, formats]
        row_scale = LIMIT_SCALE / max(abs(float(limit[r])), float(terms.max()), 1e-300)
        program += _sum_terms(pulp, variables, terms * row_scale) <= float(limit[r]) * row_scale
    return program, variables


def _sum_terms(pulp: Any, variables: list[Any], coefficients: FloatArray) -> Any:
    return pulp.LpAffineExpression(list(zip(variables, coefficients.tolist(), strict=True)))
