"""Turn an algorithm's answer into a result by recomputing it; nothing trusts a backend's status."""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from solvers.check import compute_objective, compute_use, keeps_limits, rounding_allowance
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, FloatArray, IntArray
from solvers.result import Answer, SolveResult, SolverFailure, Termination

Search = Callable[[AllocationProblem, SolveParams], Answer]

BOUND_TOLERANCE = 1e-6
"""How far, relatively, a bound may lie above a feasible objective before it is a defect and not rounding:
the feasibility tolerance of the backends."""


def run_certified(problem: AllocationProblem, params: SolveParams, *, solver: str, search: Search) -> SolveResult:
    """Runs an algorithm and returns its answer recomputed.

    A limit below the least reachable use is found here, before the algorithm runs. Feasible starts in the
    params are compared with the algorithm's choice, so a result is never worse than they are.

    Args:
        solver: name put in the result.
        search: the algorithm, from (problem, params) to Answer.

    Raises:
        SolverFailure: the choice breaks a limit or a mask, or the bound exceeds a feasible objective.
    """
    started = time.perf_counter()
    params.check_fits(problem)
    short = np.flatnonzero(problem.least_use > problem.ceiling)
    if short.size:
        excess = (problem.least_use - problem.limit)[short] / np.maximum(problem.least_use[short], 1e-300)
        fault = problem.resources[int(short[int(np.argmax(excess))])]
        answer = Answer(
            choice=None,
            lower_bound=math.inf,
            shadow_price=None,
            limit_hit=None,
            detail=f"the least reachable use of {fault} is above its limit",
            resource_at_fault=fault,
        )
    else:
        answer = search(problem, params)
    result = certify(problem, params, answer, solver=solver)
    return replace(result, seconds=time.perf_counter() - started)


def certify(problem: AllocationProblem, params: SolveParams, answer: Answer, *, solver: str) -> SolveResult:
    """Returns the result of an answer, with objective, use, gap and termination recomputed (seconds is 0)."""
    best = _take_best(problem, params, answer, solver)
    if best is None:
        return _report_nothing_found(problem, answer, solver)
    choice, objective, use = best
    allowance = rounding_allowance(problem, choice)
    if not answer.lower_bound <= objective + allowance + BOUND_TOLERANCE * abs(objective):
        msg = f"{solver} claims lower_bound={answer.lower_bound}, above a feasible objective {objective}."
        raise SolverFailure(msg)
    lower_bound = min(answer.lower_bound, objective)
    within = objective - lower_bound <= params.relative_gap_tolerance * abs(objective) + allowance
    return SolveResult(
        choice=choice,
        objective=objective,
        lower_bound=lower_bound,
        use=use,
        shadow_price=_price_or_nan(problem, answer.shadow_price),
        resources=problem.resources,
        termination=Termination.OPTIMAL if within else Termination.FEASIBLE,
        limit_hit=None if within else answer.limit_hit or "iterations",
        solver=solver,
        seconds=0.0,
        detail=answer.detail,
        least_use=problem.least_use,
        resource_at_fault=None,
        sketch_sum=answer.sketch_sum,
    )


def _take_best(
    problem: AllocationProblem, params: SolveParams, answer: Answer, solver: str
) -> tuple[IntArray, float, FloatArray] | None:
    """Returns the best of the answer's choice and the feasible starts with its objective and use, None without any."""
    choices = [] if answer.choice is None else [answer.choice]
    found = []
    for i, candidate in enumerate([*choices, *params.starts]):
        choice = np.asarray(candidate, dtype=np.int64)
        use = compute_use(problem, choice)
        if keeps_limits(problem, choice, use):
            found.append((choice, compute_objective(problem, choice), use))
        elif i < len(choices):
            msg = f"{solver} returned a choice that breaks a limit or a mask: use={use}."
            raise SolverFailure(msg)
    if not found:
        return None
    if answer.resource_at_fault is not None:
        msg = f"{solver} claims that no choice keeps every limit, but a start does."
        raise SolverFailure(msg)
    return min(found, key=lambda entry: entry[1])


def _report_nothing_found(problem: AllocationProblem, answer: Answer, solver: str) -> SolveResult:
    infeasible = answer.resource_at_fault is not None
    return SolveResult(
        choice=None,
        objective=math.inf,
        lower_bound=math.inf if infeasible else answer.lower_bound,
        use=np.full(len(problem.resources), np.nan),
        shadow_price=_price_or_nan(problem, answer.shadow_price),
        resources=problem.resources,
        termination=Termination.INFEASIBLE if infeasible else Termination.NO_SOLUTION_FOUND,
        limit_hit=None if infeasible else answer.limit_hit,
        solver=solver,
        seconds=0.0,
        detail=answer.detail,
        least_use=problem.least_use,
        resource_at_fault=answer.resource_at_fault,
        sketch_sum=answer.sketch_sum,
    )


def _price_or_nan(problem: AllocationProblem, price: FloatArray | None) -> FloatArray:
    return np.full(len(problem.resources), np.nan) if price is None else price
