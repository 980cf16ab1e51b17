"""Several budgets at scale: Lagrangian bound, exact search over the units that the prices leave in doubt.

1. Prices: maximise the dual (`dual`), which bounds the objective and ranks every candidate by its reduced
   cost loss + price . cost, less the least of its unit.
2. Incumbent: all units but a core take their least candidate; the core (the units whose second-best
   candidate has the least reduced cost) is solved exactly by HiGHS under what the others leave. An
   infeasible core doubles.
3. Proof: a better choice uses only candidates with reduced cost below incumbent - bound. When those are few
   they are solved exactly, which proves the optimum; otherwise the gap to the dual bound is the certificate.

Complexity: O(R U F) per cut of the dual, then binary programs of at most MAX_CORE_UNITS units.
Source: M. Fisher, "The Lagrangian relaxation method for solving integer programming problems", Management
Science 27 (1981); core after Pisinger (1995).
"""

import time
from dataclasses import dataclass

import numpy as np

from solvers.certification import run_certified
from solvers.dual import DualPoint, maximise_dual
from solvers.knapsack import check_separable
from solvers.milp import BinaryOutcome, minimise_binary, report_joint_infeasibility
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, BoolArray, FloatArray, IntArray
from solvers.products import price_candidates, sum_chosen
from solvers.result import Answer, SolveResult

FIRST_CORE_UNITS = 48
MAX_CORE_UNITS = 400
MAX_PROOF_CANDIDATES = 1500
CORE_NODES = 500
PROOF_NODES = 2000
GOOD_GAP = 1e-6


@dataclass(frozen=True, kw_only=True, eq=False)
class _Relaxed:
    """The problem at its best prices: tables of the binding resources, reduced cost [U, F], dual."""

    loss: FloatArray
    cost: FloatArray
    limit: FloatArray
    reduced: FloatArray
    dual: DualPoint


def solve_lagrangian(problem: AllocationProblem, params: SolveParams) -> SolveResult:
    """Returns a choice and its certified gap for any number of limits.

    Raises:
        ValueError: the problem has interactions.
    """
    return run_certified(problem, params, solver="lagrangian", search=search_lagrangian)


def search_lagrangian(problem: AllocationProblem, params: SolveParams) -> Answer:
    """Returns the answer of the lagrangian solver."""
    check_separable(problem, "lagrangian")
    deadline = params.find_deadline()
    relaxed = _relax(problem)
    dual = relaxed.dual
    if dual.proves_infeasible:
        return report_joint_infeasibility(problem, dual.price, "the Lagrangian bound exceeds every loss")
    choice, limit_hit, infeasible = _find_incumbent(relaxed, params, deadline)
    if infeasible:
        return report_joint_infeasibility(problem, dual.price, "HiGHS proved that no choice keeps every limit")
    bound, proof = dual.bound, "dual bound"
    if choice is not None:
        loss = sum_chosen(relaxed.loss, choice)
        if loss - bound > params.relative_gap_tolerance * abs(loss):
            choice, bound, limit_hit, proof = _prove(relaxed, choice, params, deadline, limit_hit)
    return Answer(
        choice=choice,
        lower_bound=bound,
        shadow_price=problem.spread_prices(dual.price),
        limit_hit=limit_hit,
        detail=f"Lagrangian dual of {len(problem.binding)} limits, exact core by HiGHS, proved by the {proof}",
    )


def _relax(problem: AllocationProblem) -> _Relaxed:
    binding = list(problem.binding)
    loss, cost, limit = problem.masked_loss, problem.masked_cost[binding], problem.target[binding]
    dual = maximise_dual(loss, cost, limit)
    priced = loss + price_candidates(dual.price, cost)
    reduced = priced - priced.min(axis=1, keepdims=True)
    return _Relaxed(loss=loss, cost=cost, limit=limit, reduced=reduced, dual=dual)


def _find_incumbent(
    relaxed: _Relaxed, params: SolveParams, deadline: float
) -> tuple[IntArray | None, str | None, bool]:
    """Returns a feasible choice or None, the limit that was hit, and whether the whole problem is
    infeasible."""
    n_units = relaxed.loss.shape[0]
    second = np.partition(relaxed.reduced, 1, axis=1)[:, 1] if relaxed.reduced.shape[1] > 1 else np.zeros(n_units)
    doubtful = np.argsort(second, kind="stable")
    best, limit_hit, size = None, None, FIRST_CORE_UNITS
    while True:
        core = np.zeros(n_units, dtype=bool)
        core[doubtful[:size]] = True
        outcome = _solve_core(relaxed, core[:, None] & np.isfinite(relaxed.loss), params, deadline)
        limit_hit = outcome.limit_hit
        if outcome.infeasible and size >= n_units:
            return None, None, True
        if outcome.choice is not None and (best is None or _is_better(relaxed, outcome.choice, best)):
            best = outcome.choice
        tolerable = best is not None and (
            sum_chosen(relaxed.loss, best) - relaxed.dual.bound
            <= max(params.relative_gap_tolerance, GOOD_GAP) * abs(relaxed.dual.bound)
        )
        enough = best is not None and (size >= MAX_CORE_UNITS or _count_open(relaxed, best) <= MAX_PROOF_CANDIDATES)
        if tolerable or enough or size >= n_units or time.perf_counter() > deadline:
            return best, limit_hit, False
        size *= 2


def _prove(
    relaxed: _Relaxed, choice: IntArray, params: SolveParams, deadline: float, limit_hit: str | None
) -> tuple[IntArray, float, str | None, str]:
    """Returns the choice, the bound, the limit hit and the kind of proof, after the exact search where it
    fits."""
    if _count_open(relaxed, choice) > MAX_PROOF_CANDIDATES:
        return choice, relaxed.dual.bound, limit_hit or "nodes", "dual bound"
    candidates, open_units = _find_open(relaxed, choice)
    outcome = _solve_core(
        relaxed, candidates & open_units[:, None], params, deadline, min(params.node_limit, PROOF_NODES)
    )
    if outcome.choice is not None and _is_better(relaxed, outcome.choice, choice):
        choice = outcome.choice
    # A choice outside the candidates is no better than the incumbent, so the core's bound holds for all.
    bound = max(relaxed.dual.bound, min(outcome.lower_bound, sum_chosen(relaxed.loss, choice)))
    return choice, bound, outcome.limit_hit, "exact search over the open candidates"


def _find_open(relaxed: _Relaxed, choice: IntArray) -> tuple[BoolArray, BoolArray]:
    """Returns the candidates that a better choice may use, [U, F], and the units that have several, [U]."""
    candidates = relaxed.reduced <= sum_chosen(relaxed.loss, choice) - relaxed.dual.bound
    return candidates, candidates.sum(axis=1) > 1


def _count_open(relaxed: _Relaxed, choice: IntArray) -> int:
    candidates, open_units = _find_open(relaxed, choice)
    return int(candidates[open_units].sum())


def _solve_core(
    relaxed: _Relaxed,
    candidates: BoolArray,
    params: SolveParams,
    deadline: float,
    node_limit: int = CORE_NODES,
) -> BinaryOutcome:
    """Solves for the units that have candidates [U, F], the others at their least reduced cost."""
    choice = relaxed.reduced.argmin(axis=1)
    open_units = np.flatnonzero(candidates.any(axis=1))
    fixed = np.ones(choice.size, dtype=bool)
    fixed[open_units] = False
    fixed_units = np.flatnonzero(fixed)
    fixed_loss = float(relaxed.loss[fixed_units, choice[fixed_units]].sum())
    left = relaxed.limit - relaxed.cost[:, fixed_units, choice[fixed_units]].sum(axis=1)
    loss = np.where(candidates, relaxed.loss, np.inf)[open_units]
    # What is wanted relative to the whole objective, HiGHS takes relative to the core's, shifted by its least.
    core_loss = relaxed.dual.bound - fixed_loss - float(loss.min(axis=1).sum())
    wanted = params.relative_gap_tolerance * abs(relaxed.dual.bound)
    outcome = minimise_binary(
        loss,
        relaxed.cost[:, open_units],
        left,
        relative_gap=min(0.5 * wanted / core_loss, 1.0) if core_loss > 0 else 0.0,
        deadline=deadline,
        node_limit=node_limit,
    )
    if outcome.choice is not None:
        choice = choice.copy()
        choice[open_units] = outcome.choice
    return BinaryOutcome(
        choice=None if outcome.choice is None else choice,
        lower_bound=fixed_loss + outcome.lower_bound,
        limit_hit=outcome.limit_hit,
        infeasible=outcome.infeasible,
    )


def _is_better(relaxed: _Relaxed, choice: IntArray, than: IntArray) -> bool:
    return sum_chosen(relaxed.loss, choice) < sum_chosen(relaxed.loss, than)
