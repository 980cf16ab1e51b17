"""One timed run of our solver, scipy's HiGHS or PuLP's CBC on an instance.

Every choice is recomputed (`solvers.check`); gaps are (objective - bound) / objective. Times include handing the
program to the backend, its limit does not. CBC's bound is not handed out by PuLP, so an unfinished run of it is
rated against our bound.
"""

import time
import warnings
from dataclasses import dataclass

import numpy as np

from solvers import (
    AllocationProblem,
    SolveParams,
    SolverFailure,
    check_result,
    compute_objective,
    is_feasible,
    solve,
)

OBJECTIVE_SCALE = 1e6
"""HiGHS and CBC have absolute tolerances; objectives are scaled to this size for them."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run.

    Args:
        seconds: wall time.
        gap: relative gap, None without a choice.
        hit_limit: the solver stopped at its time limit, not because it was done.
        note: what else the reader must know.
    """

    seconds: float
    gap: float | None
    hit_limit: bool
    note: str = ""

    def reached(self, gap: float) -> bool:
        """Returns whether the solver ended by itself at a gap asked for."""
        return self.gap is not None and not self.hit_limit and self.gap <= gap * (1 + 1e-6)


def run_ours(problem: AllocationProblem, gap: float, time_limit_s: float) -> tuple[Measurement, float]:
    """Returns the measurement of `solve`, and the bound it proved."""
    started = time.perf_counter()
    result = solve(problem, params=SolveParams(relative_gap_tolerance=gap, time_limit_s=time_limit_s))
    seconds = time.perf_counter() - started
    violations = check_result(problem, result, relative_gap_tolerance=gap)
    if violations:
        msg = f"result must hold: got {'; '.join(violations)}."
        raise SolverFailure(msg)
    hit_limit = result.limit_hit == "time"
    return Measurement(seconds=seconds, gap=result.relative_gap, hit_limit=hit_limit), result.lower_bound


def run_highs(problem: AllocationProblem, gap: float, time_limit_s: float, lower_bound: float) -> Measurement:
    """Returns the measurement of scipy.optimize.milp on the plain binary program; its own bound."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    n_units, n_formats = problem.loss.shape
    scale = OBJECTIVE_SCALE / lower_bound
    started = time.perf_counter()
    unit = np.repeat(np.arange(n_units), n_formats)
    one_each = csr_array((np.ones(unit.size), (unit, np.arange(unit.size))))
    row_scale = 1e4 / problem.limit
    limits = problem.cost.reshape(problem.limit.size, -1) * row_scale[:, None]
    found = milp(
        problem.loss.ravel() * scale,
        integrality=np.ones(unit.size, dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(limits, -np.inf, problem.limit * row_scale)],
        options={"mip_rel_gap": gap, "time_limit": time_limit_s},
    )
    seconds = time.perf_counter() - started
    # Status 1 is a limit, of time or of nodes; there is none of nodes here.
    hit_limit = found.status == 1
    if found.x is None:
        return Measurement(seconds=seconds, gap=None, hit_limit=hit_limit)
    choice = found.x.reshape(problem.loss.shape).argmax(axis=1)
    objective = compute_objective(problem, choice)
    bound = -np.inf if found.mip_dual_bound is None else found.mip_dual_bound / scale
    note = "" if is_feasible(problem, choice) else "limit exceeded within its tolerance"
    return Measurement(seconds=seconds, gap=max(objective - bound, 0.0) / objective, hit_limit=hit_limit, note=note)


def run_cbc(problem: AllocationProblem, gap: float, time_limit_s: float, lower_bound: float) -> Measurement:
    """Returns the measurement of CBC through PuLP on the plain binary program; rated against our bound."""
    import pulp

    n_units, n_formats = problem.loss.shape
    scale = OBJECTIVE_SCALE / lower_bound
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        variables = [pulp.LpVariable(f"x{i}", cat="Binary") for i in range(n_units * n_formats)]
        program = pulp.LpProblem("allocation", pulp.LpMinimize)
        losses = (problem.loss.ravel() * scale).tolist()
        program += pulp.LpAffineExpression(list(zip(variables, losses, strict=True)))
        for u in range(n_units):
            program += pulp.lpSum(variables[u * n_formats : (u + 1) * n_formats]) == 1
        for cost, limit in zip(problem.cost, problem.limit, strict=True):
            terms = (cost.ravel() * (1e4 / limit)).tolist()
            program += pulp.LpAffineExpression(list(zip(variables, terms, strict=True))) <= 1e4
        program.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, gapRel=gap, timeLimit=time_limit_s))
    seconds = time.perf_counter() - started
    if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return Measurement(seconds=seconds, gap=None, hit_limit=True)
    values = np.array([variable.value() or 0.0 for variable in variables])
    choice = values.reshape(problem.loss.shape).argmax(axis=1)
    objective = compute_objective(problem, choice)
    hit_limit = program.sol_status != pulp.LpSolutionOptimal
    note = "limit exceeded within its tolerance"
    if is_feasible(problem, choice):
        note = "against our bound" if hit_limit else ""
    gap_reached = max(objective - lower_bound, 0.0) / objective
    return Measurement(seconds=seconds, gap=gap_reached, hit_limit=hit_limit, note=note)


def run(backend: str, problem: AllocationProblem, gap: float, time_limit_s: float, bound: float) -> Measurement:
    """Returns the measurement of a backend by name; `bound` is our lower bound of the objective."""
    if backend == "ours":
        return run_ours(problem, gap, time_limit_s)[0]
    return {"HiGHS": run_highs, "CBC": run_cbc}[backend](problem, gap, time_limit_s, bound)
