"""Several budgets through PuLP, by CBC or HiGHS: the backends people know, for comparison.

The same binary program as `milp`. PuLP is imported when asked for; version 3 (before 4) brings CBC along, HiGHS is
the package highspy. PuLP returns no bound of CBC for a run cut short, so the bound then is the Lagrangian one; for a
run that CBC calls optimal it is the objective less the gap that CBC was allowed. HiGHS' bound is its own.

Complexity: exponential at worst; thousands of candidates in seconds to minutes.
Sources: J. Forrest and R. Lougee-Heimer, "CBC user guide", INFORMS TutORials (2005); Q. Huangfu and J. Hall,
"Parallelizing the dual revised simplex method", Math. Prog. Comp. 10 (2018).
"""

import importlib
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from solvers.certification import run_certified
from solvers.dual import DualPoint, maximise_dual
from solvers.knapsack import check_separable
from solvers.milp import LIMIT_SCALE, LOSS_RANGE, report_joint_infeasibility, scale_gap
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, FloatArray, IntArray
from solvers.products import sum_chosen
from solvers.result import Answer, SolveResult

ROW_MARGIN = 1e-6
"""The backends' row tolerance, relative to LIMIT_SCALE; limits are drawn in by it when a choice exceeds them."""

TITLES = {"cbc": "CBC", "pulp_highs": "HiGHS through PuLP"}


@dataclass(frozen=True, kw_only=True, eq=False)
class PulpOutcome:
    """What a backend claims: choice or None, whether it is optimal or there is none, and its bound if it tells."""

    choice: IntArray | None
    optimal: bool = False
    infeasible: bool = False
    lower_bound: float = -math.inf


def solve_cbc(problem: AllocationProblem, params: SolveParams) -> SolveResult:
    """Returns the optimum, or incumbent and bound, by CBC.

    Raises:
        ValueError: the problem has interactions.
        ImportError: PuLP is not installed.
    """
    return _solve_by(problem, params, "cbc")


def solve_pulp_highs(problem: AllocationProblem, params: SolveParams) -> SolveResult:
    """Returns the optimum, or incumbent and bound, by HiGHS through PuLP.

    Raises:
        ValueError: the problem has interactions.
        ImportError: PuLP or highspy is not installed.
    """
    return _solve_by(problem, params, "pulp_highs")


def _solve_by(problem: AllocationProblem, params: SolveParams, solver: str) -> SolveResult:
    def search(problem: AllocationProblem, params: SolveParams) -> Answer:
        check_separable(problem, solver)
        _import_package("pulp", "PuLP", "'pulp<4'", solver)
        if solver == "pulp_highs":
            _import_package("highspy", "highspy", "highspy", solver)
        return _search(problem, params, solver)

    return run_certified(problem, params, solver=solver, search=search)


def _search(problem: AllocationProblem, params: SolveParams, solver: str) -> Answer:
    binding = list(problem.binding)
    loss, cost, limit = problem.masked_loss, problem.masked_cost[binding], problem.target[binding]
    dual = maximise_dual(loss, cost, limit)
    gap = scale_gap(params.relative_gap_tolerance, loss, dual.bound)
    choice, bound, limit_hit = None, dual.bound, None
    for margin in (0.0, ROW_MARGIN):
        found = _run(solver, loss, cost, limit - margin * np.abs(limit), gap, params)
        # What holds under limits drawn in is no proof for the limits given.
        if margin == 0.0:
            if found.infeasible:
                detail = f"{TITLES[solver]} proved that no choice keeps every limit"
                return report_joint_infeasibility(problem, dual.price, detail)
            bound = max(bound, found.lower_bound)
        limit_hit = limit_hit or (None if found.optimal or found.infeasible else "time")
        if found.choice is not None and _keeps(cost, limit, found.choice):
            choice = found.choice
            break
    return _answer(problem, choice, bound, limit_hit, dual, TITLES[solver])


def _answer(
    problem: AllocationProblem,
    choice: IntArray | None,
    bound: float,
    limit_hit: str | None,
    dual: DualPoint,
    title: str,
) -> Answer:
    return Answer(
        choice=choice,
        lower_bound=bound,
        shadow_price=problem.spread_prices(dual.price),
        limit_hit=limit_hit,
        detail=f"{title} over {int(problem.allowed.sum())} binary variables and {len(problem.binding)} limits",
    )


def _keeps(cost: FloatArray, limit: FloatArray, choice: IntArray) -> bool:
    return bool(np.all(cost[:, np.arange(choice.size), choice].sum(axis=1) <= limit))


def _import_package(module: str, title: str, requirement: str, solver: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        msg = f"solver {solver!r} needs {title}: it is not installed. Run pip install {requirement}, or use 'milp'."
        raise ImportError(msg) from error


def _run(
    solver: str, loss: FloatArray, cost: FloatArray, limit: FloatArray, relative_gap: float, params: SolveParams
) -> PulpOutcome:
    """Runs a backend on one binary program and translates what comes back."""
    pulp: Any = importlib.import_module("pulp")
    with warnings.catch_warnings():
        # PuLP 3 announces version 4, which is ruled out by the requirement pulp<4.
        warnings.simplefilter("ignore", DeprecationWarning)
        program, variables, scale = _build_program(pulp, loss, cost, limit)
        program.solve(_build_backend(pulp, solver, relative_gap, params.time_limit_s))
    if program.status == pulp.LpStatusInfeasible:
        return PulpOutcome(choice=None, infeasible=True)
    least, bound = float(loss.min(axis=1).sum()), -math.inf
    if solver == "pulp_highs":
        bound = least + float(program.solverModel.getInfo().mip_dual_bound) / scale
    if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return PulpOutcome(choice=None, lower_bound=bound)
    weights = np.full(loss.shape, -1.0)
    weights[np.isfinite(loss)] = [variable.value() or 0.0 for variable in variables]
    choice = weights.argmax(axis=1)
    optimal = program.sol_status == pulp.LpSolutionOptimal
    if optimal and solver == "cbc":
        # CBC's gap is relative to the shifted objective.
        objective = sum_chosen(loss, choice)
        bound = objective - relative_gap * (objective - least)
    return PulpOutcome(choice=choice, optimal=optimal, lower_bound=bound)


def _build_backend(pulp: Any, solver: str, relative_gap: float, time_limit_s: float | None) -> Any:
    settings: dict[str, Any] = {"msg": False, "gapRel": relative_gap, "timeLimit": time_limit_s}
    return pulp.PULP_CBC_CMD(threads=1, **settings) if solver == "cbc" else pulp.HiGHS(parallel="off", **settings)


def _build_program(pulp: Any, loss: FloatArray, cost: FloatArray, limit: FloatArray) -> tuple[Any, list[Any], float]:
    """Returns the PuLP program, its variables, one per allowed candidate in row order, and the scale of its losses."""
    unit, formats = np.nonzero(np.isfinite(loss))
    shifted = loss[unit, formats] - loss.min(axis=1)[unit]
    scale = LOSS_RANGE / float(shifted.max()) if shifted.max() > 0 else 1.0
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
    return program, variables, scale


def _sum_terms(pulp: Any, variables: list[Any], coefficients: FloatArray) -> Any:
    return pulp.LpAffineExpression(list(zip(variables, coefficients.tolist(), strict=True)))
