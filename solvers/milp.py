"""Several budgets, exactly: mixed-integer linear program by HiGHS (scipy.optimize.milp).

    minimise  sum loss[u, f] x[u, f]   subject to  sum_f x[u, f] = 1,  sum cost[r, u, f] x[u, f] <=
    limit[r],  x binary

over the allowed candidates. HiGHS has absolute tolerances (1e-6 on rows and on the gap), so losses are
shifted and scaled to a range of about 1e6 and every limit to 1e4 first. A choice that HiGHS accepts within
its row tolerance but that exceeds a limit is solved for again with that limit drawn in. The bound of a run
cut short is HiGHS' own.

Complexity: exponential at worst; thousands of candidates in seconds.
Source: Q. Huangfu and J. Hall, "Parallelizing the dual revised simplex method", Math. Prog. Comp. 10 (2018).
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from solvers.certification import run_certified
from solvers.dual import maximise_dual
from solvers.knapsack import check_separable
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, BoolArray, FloatArray, IntArray
from solvers.result import Answer, SolveResult

LOSS_RANGE = 1e6
LIMIT_SCALE = 1e4
MAX_DRAWN_IN = 4
PROOF_GAP = 1e-7


@dataclass(frozen=True, kw_only=True, eq=False)
class BinaryOutcome:
    """Outcome of one binary program: choice or None, lower bound, limit hit, and whether proved
    infeasible."""

    choice: IntArray | None
    lower_bound: float
    limit_hit: str | None
    infeasible: bool


def solve_milp(problem: AllocationProblem, params: SolveParams) -> SolveResult:
    """Returns the optimum, or incumbent and bound, by HiGHS.

    Raises:
        ValueError: the problem has interactions.
    """
    return run_certified(problem, params, solver="milp", search=search_milp)


def search_milp(problem: AllocationProblem, params: SolveParams) -> Answer:
    """Returns the answer of the milp solver."""
    check_separable(problem, "milp")
    binding = list(problem.binding)
    dual = maximise_dual(problem.masked_loss, problem.masked_cost[binding], problem.target[binding])
    outcome = minimise_binary(
        problem.masked_loss,
        problem.masked_cost[binding],
        problem.target[binding],
        relative_gap=scale_gap(params.relative_gap_tolerance, problem.masked_loss, dual.bound),
        deadline=params.find_deadline(),
        node_limit=params.node_limit,
    )
    if outcome.infeasible:
        return report_joint_infeasibility(problem, dual.price, "HiGHS proved that no choice keeps every limit")
    return Answer(
        choice=outcome.choice,
        lower_bound=max(outcome.lower_bound, dual.bound),
        shadow_price=problem.spread_prices(dual.price),
        limit_hit=outcome.limit_hit,
        detail=f"HiGHS over {int(problem.allowed.sum())} binary variables and {len(binding)} limits",
    )


def report_joint_infeasibility(problem: AllocationProblem, price: FloatArray, detail: str) -> Answer:
    """Returns the answer for limits that are reachable one by one but not together.

    Args:
        price: prices of the binding limits; the resource at fault is the one whose limit weighs most.
    """
    binding = list(problem.binding)
    weight = price * np.maximum(problem.target[binding], 1e-300)
    return Answer(
        choice=None,
        lower_bound=np.inf,
        shadow_price=None,
        limit_hit=None,
        detail=detail,
        resource_at_fault=problem.resources[binding[int(np.argmax(weight))]],
    )


def scale_gap(relative_gap: float, loss: FloatArray, dual_bound: float) -> float:
    """Returns the gap to ask of a backend, which takes it relative to the objective after losses are shifted.

    Args:
        relative_gap: wanted, relative to the objective itself.
        loss: masked loss, shifted by its least in every unit for the backend, [U, F].
        dual_bound: estimate of the objective.

    Returns:
        0 for a gap below what the backends resolve anyway.
    """
    if relative_gap <= PROOF_GAP:
        return 0.0
    shifted = dual_bound - float(loss.min(axis=1).sum())
    return relative_gap * (min(1.0, abs(dual_bound) / shifted) if shifted > 0 else 1.0)


def minimise_binary(
    loss: FloatArray,
    cost: FloatArray,
    limit: FloatArray,
    *,
    relative_gap: float,
    deadline: float,
    node_limit: int,
) -> BinaryOutcome:
    """Solves one binary program with HiGHS.

    Args:
        loss: inf where not allowed, [U, F].
        cost: [R, U, F].
        limit: finite, [R].
        relative_gap: stop at this gap relative to |objective|.
        deadline: time.perf_counter() value after which to stop.
    """
    if not loss.size:
        return _solve_nothing(limit)
    valid = np.isfinite(loss)
    least = loss.min(axis=1, keepdims=True)
    drawn_in = limit.astype(np.float64)
    bound = -np.inf
    for attempt in range(MAX_DRAWN_IN):
        remaining = deadline - time.perf_counter()
        if remaining <= 0:
            return BinaryOutcome(choice=None, lower_bound=bound, limit_hit="time", infeasible=False)
        run = _run_highs(loss - least, cost, drawn_in, valid, relative_gap, remaining, node_limit)
        if attempt == 0:
            bound = run.lower_bound + float(least.sum())
            if run.infeasible:
                return BinaryOutcome(choice=None, lower_bound=np.inf, limit_hit=None, infeasible=True)
        if run.choice is None:
            break
        use = cost[:, np.arange(loss.shape[0]), run.choice].sum(axis=1)
        if np.all(use <= limit):
            return BinaryOutcome(choice=run.choice, lower_bound=bound, limit_hit=run.limit_hit, infeasible=False)
        drawn_in = np.minimum(drawn_in, limit - 2.0 * np.maximum(use - limit, 0.0))
    return BinaryOutcome(choice=None, lower_bound=bound, limit_hit=run.limit_hit or "iterations", infeasible=False)


def _solve_nothing(limit: FloatArray) -> BinaryOutcome:
    """Returns the outcome of a program without units: feasible if nothing is owed."""
    if np.all(limit >= 0):
        empty = np.zeros(0, dtype=np.int64)
        return BinaryOutcome(choice=empty, lower_bound=0.0, limit_hit=None, infeasible=False)
    return BinaryOutcome(choice=None, lower_bound=np.inf, limit_hit=None, infeasible=True)


def _run_highs(
    loss: FloatArray,
    cost: FloatArray,
    limit: FloatArray,
    valid: BoolArray,
    relative_gap: float,
    time_limit_s: float,
    node_limit: int,
) -> BinaryOutcome:
    """Runs scipy.optimize.milp on shifted losses (least 0 in every unit) and translates what comes back."""
    from scipy.optimize import Bounds, milp

    unit, formats = np.nonzero(valid)
    objective = loss[unit, formats]
    scale = LOSS_RANGE / float(objective.max()) if objective.max() > 0 else 1.0
    options: Any = {"mip_rel_gap": relative_gap, "node_limit": min(node_limit, 2**31 - 1)}
    if np.isfinite(time_limit_s):
        options["time_limit"] = time_limit_s
    found: Any = milp(
        objective * scale,
        integrality=np.ones(unit.size, dtype=np.int64),
        bounds=Bounds(0, 1),
        constraints=_build_rows(unit, cost[:, unit, formats], limit, loss.shape[0]),
        options=options,
    )
    if found.status == 2:
        return BinaryOutcome(choice=None, lower_bound=np.inf, limit_hit=None, infeasible=True)
    choice = None
    if found.x is not None:
        weights = np.zeros(loss.shape)
        weights[unit, formats] = found.x
        choice = np.where(valid, weights, -1.0).argmax(axis=1)
    known = found.mip_dual_bound is not None and np.isfinite(found.mip_dual_bound)
    bound = float(found.mip_dual_bound) / scale if known else -np.inf
    limit_hit = None if found.status == 0 else _name_limit(found, node_limit)
    return BinaryOutcome(choice=choice, lower_bound=bound, limit_hit=limit_hit, infeasible=False)


def _build_rows(unit: IntArray, cost: FloatArray, limit: FloatArray, n_units: int) -> list[Any]:
    """Returns the one-format-per-unit rows and the scaled limit rows."""
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_array

    one_hot = csr_array((np.ones(unit.size), (unit, np.arange(unit.size))), shape=(n_units, unit.size))
    rows = [LinearConstraint(one_hot, 1, 1)]
    if limit.size:
        scale = LIMIT_SCALE / np.maximum(np.abs(limit), np.maximum(cost.max(axis=1), 1e-300))
        rows.append(LinearConstraint(cost * scale[:, None], -np.inf, limit * scale))
    return rows


def _name_limit(found: Any, node_limit: int) -> str:
    nodes = found.mip_node_count
    return "nodes" if nodes is not None and nodes >= node_limit else "time"
