"""Several budgets, exactly: branch and bound on the prices, with an exact core search at its leaves.

    minimise  sum_u loss[u, c_u]   subject to  sum_u cost[r, u, c_u] <= limit[r]   for every r

1. Relax: the best prices of the limits (`dual`), which bound the objective and give every candidate a reduced cost.
   Limits in whole numbers are first lowered to what can be used at all.
2. Improve: a narrow search (`multi_core`) over the changes of least reduced cost per size finds an incumbent.
3. Prove: candidates whose reduced cost reaches incumbent - bound cannot pay. Where few are left, a wide search over
   them closes the gap; otherwise, or when it grows too large, the unit that the relaxation divides and whose formats
   differ most is fixed to each of its formats in turn, and every part is relaxed anew. The part of least bound is next.

Rounding such a unit is what makes the first bound weak: an embedding of a quarter of all bytes, say. Once it is
fixed, the rest is dense and the core search short. What exceeds MAX_STATES is left to HiGHS, over the candidates that
may still pay.

Complexity: O(R U F) per evaluation of the dual; the search is exponential at worst, some thousand states in practice.
Limits: no interactions; proves little beyond some thousand units to tolerances below 1e-6.
Sources: M. Fisher, "The Lagrangian relaxation method for solving integer programming problems", Management Science 27
(1981); core after D. Pisinger, EJOR 83 (1995).
"""

import heapq
import math
import time
from dataclasses import dataclass, field

import numpy as np

from solvers.certification import run_certified
from solvers.convex_hull import find_cost_quantum
from solvers.extremes import find_least
from solvers.knapsack import check_separable
from solvers.knapsack_core import CoreOutcome
from solvers.milp import minimise_binary, report_joint_infeasibility, scale_gap
from solvers.multi_core import build_multi_core, measure_changes, search_multi_core
from solvers.params import SolveParams
from solvers.parts import Part, keep_candidates, list_branches, relax_part
from solvers.problem import AllocationProblem, BoolArray, FloatArray, IntArray
from solvers.products import sum_chosen
from solvers.result import Answer, SolveResult

NARROW_WIDTH, NARROW_CHANGES = 60, 50
WIDE_WIDTH, WIDE_CHANGES, WIDE_STATES = 4000, 150, 120_000
MAX_STATES = 1_000_000
MAX_PARTS = 5000


@dataclass(eq=False)
class _Search:
    """The parts still to look at, by bound; the incumbent; what was left out, and what it all took."""

    relative_gap: float
    deadline: float
    max_states: int
    loss: FloatArray
    parts: list[tuple[float, int, Part]] = field(default_factory=list)
    best_loss: float = math.inf
    best_choice: IntArray | None = None
    least_left_out: float = math.inf
    n_states: int = 0
    n_parts: int = 0

    @property
    def tolerance(self) -> float:
        """Half the gap allowed: improvements of less are not looked for."""
        return 0.5 * min(self.relative_gap, 1.0) * abs(self.best_loss) if self.best_choice is not None else 0.0

    @property
    def cutoff(self) -> float:
        """A part with this bound or more is done with."""
        return self.best_loss - self.tolerance


def solve_multi_knapsack(problem: AllocationProblem, params: SolveParams) -> SolveResult:
    """Returns the optimum of a separable problem under any number of limits.

    Raises:
        ValueError: the problem has interactions.
    """
    return run_certified(problem, params, solver="multi_knapsack", search=search_multi_knapsack)


def search_multi_knapsack(problem: AllocationProblem, params: SolveParams) -> Answer:
    """Returns the answer of the multi_knapsack solver; limits below the least use must have been ruled out."""
    check_separable(problem, "multi_knapsack")
    binding = list(problem.binding)
    loss, cost = problem.masked_loss, problem.masked_cost[binding]
    limit = _lower_to_reachable(loss, cost, problem.target[binding])
    search = _Search(
        relative_gap=params.relative_gap_tolerance,
        deadline=params.find_deadline(),
        max_states=min(params.node_limit, MAX_STATES),
        loss=loss,
    )
    units = np.arange(problem.n_units)
    root = relax_part(units, loss, cost, limit, 0.0, np.zeros_like(units), None)
    if root.dual.proves_infeasible:
        return report_joint_infeasibility(problem, root.dual.price, "the Lagrangian bound exceeds every loss")
    _push(search, root)
    limit_hit = _search_parts(search)
    bound, by_highs = max(min(search.cutoff, search.least_left_out), root.bound), ""
    if limit_hit == "nodes" and params.node_limit > MAX_STATES:
        bound, limit_hit = _finish_by_highs(search, root, params)
        by_highs = ", the rest by HiGHS"
    if search.best_choice is None and limit_hit is None:
        return report_joint_infeasibility(
            problem, root.dual.price, "the search proved that no choice keeps every limit"
        )
    return Answer(
        choice=search.best_choice,
        lower_bound=bound,
        shadow_price=problem.spread_prices(root.dual.price),
        limit_hit=limit_hit,
        detail=f"Lagrangian dual of {len(binding)} limits, then an exact search over {search.n_states} states in "
        f"{search.n_parts} parts{by_highs}",
    )


def _lower_to_reachable(loss: FloatArray, cost: FloatArray, limit: FloatArray) -> FloatArray:
    """Returns the limits [R] lowered to the least use plus a whole number of the steps that all uses are made of."""
    lowered = limit.copy()
    for r in range(limit.size):
        quantum = find_cost_quantum(cost[r], loss)
        if quantum > 0:
            least = float(find_least(np.where(np.isfinite(loss), cost[r], np.inf)).sum())
            lowered[r] = max(least + quantum * np.floor((limit[r] - least) / quantum), least)
    return lowered


def _push(search: _Search, part: Part) -> None:
    if part.bound >= search.cutoff:
        search.least_left_out = min(search.least_left_out, part.bound)
        return
    search.n_parts += 1
    heapq.heappush(search.parts, (part.bound, search.n_parts, part))


def _search_parts(search: _Search) -> str | None:
    """Takes up parts by rising bound until none can improve; returns the limit that cut this short."""
    while search.parts:
        bound, _, part = heapq.heappop(search.parts)
        timed_out = time.perf_counter() > search.deadline
        if bound >= search.cutoff or timed_out or search.n_states > search.max_states or search.n_parts > MAX_PARTS:
            search.least_left_out = min(search.least_left_out, bound)
            if bound >= search.cutoff:
                return None
            return "time" if timed_out else "nodes"
        remainder = _close(search, part)
        if remainder is not None and remainder.units.size:
            for branch in list_branches(remainder):
                _push(search, branch)
    return None


def _close(search: _Search, part: Part) -> Part | None:
    """Searches a part; returns None when it is done with, otherwise the part without what cannot pay."""
    if not part.units.size:
        if np.all(part.limit >= 0):
            _offer(search, part.choice)
        return None
    dual = part.dual
    own = np.arange(part.loss.shape[1]) == dual.choice[:, None]
    reduced, size = measure_changes(part.loss, part.cost, dual.price, dual.choice)
    # Not the part's bound: that of a part around it says nothing about candidates.
    least_loss = part.fixed_loss + dual.bound + reduced
    useful = ~own & (least_loss < search.cutoff)
    if search.best_choice is None or np.count_nonzero(useful) > NARROW_CHANGES:
        ratio = np.where(useful, reduced / np.maximum(size, 1e-300), np.inf)
        most = np.sort(ratio, axis=None)[min(NARROW_CHANGES, ratio.size) - 1]
        _run_core(search, part, useful & (ratio <= most), NARROW_WIDTH, search.max_states)
        useful &= least_loss < search.cutoff
    bound = part.bound
    if search.best_choice is not None and np.count_nonzero(useful) <= WIDE_CHANGES:
        outcome = _run_core(search, part, useful, WIDE_WIDTH, WIDE_STATES)
        bound = max(bound, min(search.best_loss, _bound_of(part, outcome)))
        if outcome.limit_hit is None and bound >= search.cutoff - search.tolerance:
            search.least_left_out = min(search.least_left_out, bound)
            return None
        useful &= least_loss < search.cutoff
    return keep_candidates(part, useful | own, bound)


def _bound_of(part: Part, outcome: CoreOutcome) -> float:
    return part.fixed_loss + sum_chosen(part.loss, part.dual.choice) + outcome.lower_bound


def _run_core(search: _Search, part: Part, useful: BoolArray, width: int, max_states: int) -> CoreOutcome:
    """Runs the core search over the useful changes [V, F], and takes over a better choice."""
    dual = part.dual
    base_loss = part.fixed_loss + sum_chosen(part.loss, dual.choice)
    outcome = search_multi_core(
        build_multi_core(part.loss, part.cost, part.limit, dual.price, dual.choice, useful),
        incumbent=search.best_loss - base_loss,
        tolerance=search.tolerance,
        width=width,
        max_states=max_states,
        deadline=search.deadline,
    )
    search.n_states += outcome.n_states
    if outcome.changes is not None:
        choice = part.choice.copy()
        choice[part.units] = dual.choice
        for unit, chosen in outcome.changes:
            choice[part.units[unit]] = chosen
        _offer(search, choice)
    return outcome


def _offer(search: _Search, choice: IntArray) -> None:
    """Takes a feasible choice [U] over if it is better than the incumbent."""
    loss = sum_chosen(search.loss, choice)
    if loss < search.best_loss:
        search.best_loss, search.best_choice = loss, choice


def _finish_by_highs(search: _Search, root: Part, params: SolveParams) -> tuple[float, str | None]:
    """Solves over the candidates that may still pay; returns the bound and the limit that was hit."""
    reduced, _ = measure_changes(root.loss, root.cost, root.dual.price, root.dual.choice)
    loss = np.where(root.bound + reduced < search.cutoff, root.loss, np.inf)
    rows = np.arange(loss.shape[0])
    loss[rows, root.dual.choice] = root.loss[rows, root.dual.choice]
    outcome = minimise_binary(
        loss,
        root.cost,
        root.limit,
        relative_gap=scale_gap(params.relative_gap_tolerance, loss, root.bound),
        deadline=search.deadline,
        node_limit=params.node_limit,
    )
    if outcome.choice is not None:
        _offer(search, outcome.choice)
    # A choice outside these candidates is no better than the incumbent less the tolerance.
    return max(root.bound, min(search.cutoff, outcome.lower_bound)), outcome.limit_hit
