"""Greedy by loss per cost: the rule of most hand-made allocators.

From the least loss of every unit, the move that gains the least loss per unit of cost saved is made until the
limits hold; then improvements that still fit are taken in order of loss per cost. With several limits a cost is the
sum of its shares of the limits exceeded.

Complexity: O(U F log U). Limits: blind to everything off the convex hull and to the last step's size; with several
limits it may find nothing although there is a choice.
"""

import heapq

import numpy as np

from solvers.certification import run_certified
from solvers.check import is_feasible
from solvers.dual_bound import answer_with_dual_bound, find_dual_bound
from solvers.knapsack import check_separable
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, FloatArray, IntArray
from solvers.products import price_candidates
from solvers.result import Answer, SolveResult

MAX_ROUNDS = 8


def solve_greedy(problem: AllocationProblem, params: SolveParams) -> SolveResult:
    """Returns the greedy choice with the Lagrangian bound.

    Raises:
        ValueError: the problem has interactions.
    """
    return run_certified(problem, params, solver="greedy", search=search_greedy)


def search_greedy(problem: AllocationProblem, params: SolveParams) -> Answer:
    """Returns the answer of the greedy solver."""
    check_separable(problem, "greedy")
    detail = "least loss per cost saved until the limits hold, then what still fits"
    return answer_with_dual_bound(problem, build_greedy_choice(problem), find_dual_bound(problem), detail=detail)


def build_greedy_choice(problem: AllocationProblem) -> IntArray | None:
    """Returns the greedy choice [U], None when it reaches none that keeps every limit."""
    rows = np.arange(problem.n_units)
    # A cost that counts as a share of what all units could use, so that resources can be added.
    share = np.where(problem.most_use > 0, 1.0 / np.maximum(problem.most_use, 1e-300), 0.0)
    share[[r for r in range(share.size) if r not in problem.binding]] = 0.0
    choice = problem.masked_loss.argmin(axis=1)
    for _ in range(MAX_ROUNDS):
        use = problem.masked_cost[:, rows, choice].sum(axis=1)
        exceeded = use > problem.target
        if not exceeded.any():
            break
        _give_up_loss(problem, choice, use, np.where(exceeded, share, 0.0))
    if not is_feasible(problem, choice):
        choice = np.where(problem.allowed, price_candidates(share, problem.masked_cost), np.inf).argmin(axis=1)
    if not is_feasible(problem, choice):
        return None
    filled = _fill(problem, choice, share)
    return filled if is_feasible(problem, filled) else choice


def _give_up_loss(problem: AllocationProblem, choice: IntArray, use: FloatArray, share: FloatArray) -> None:
    """Changes choice and use, in place, until the limits of the priced resources hold or no move is left."""
    priced = price_candidates(share, problem.masked_cost)
    loss, cost = problem.masked_loss, problem.masked_cost
    rows = np.arange(choice.size)
    watched = share > 0
    ratio = _rate_moves(loss, priced, loss[rows, choice][:, None], priced[rows, choice][:, None])
    best = ratio.argmin(axis=1)
    heap = [(float(ratio[u, best[u]]), int(u), int(best[u])) for u in rows if np.isfinite(ratio[u, best[u]])]
    heapq.heapify(heap)
    while heap and np.any(use[watched] > problem.target[watched]):
        _, unit, chosen = heapq.heappop(heap)
        use += cost[:, unit, chosen] - cost[:, unit, choice[unit]]
        choice[unit] = chosen
        following = _rate_moves(loss[unit], priced[unit], loss[unit, chosen], priced[unit, chosen])
        nearest = int(following.argmin())
        if np.isfinite(following[nearest]):
            heapq.heappush(heap, (float(following[nearest]), unit, nearest))


def _rate_moves(
    loss: FloatArray, priced: FloatArray, loss_now: FloatArray | float, priced_now: FloatArray | float
) -> FloatArray:
    """Returns loss gained per cost saved by every move; inf where nothing is saved."""
    saved = priced_now - priced
    return np.where(saved > 0, (loss - loss_now) / np.where(saved > 0, saved, 1.0), np.inf)


def _fill(problem: AllocationProblem, choice: IntArray, share: FloatArray) -> IntArray:
    """Returns the choice after every improvement that fits, most loss per cost first."""
    rows = np.arange(choice.size)
    filled = choice.copy()
    cost = problem.masked_cost
    slack = problem.target - cost[:, rows, filled].sum(axis=1)
    change = problem.masked_loss - problem.masked_loss[rows, filled][:, None]
    step = cost - cost[:, rows, filled][:, :, None]
    fits = np.all(step <= np.maximum(slack, 0.0)[:, None, None], axis=0) & (change < 0)
    unit, formats = np.nonzero(fits)
    priced = np.maximum(price_candidates(share, step)[unit, formats], 1e-300)
    for i in np.argsort(change[unit, formats] / priced, kind="stable"):
        u, f = unit[i], formats[i]
        used = cost[:, u, f] - cost[:, u, filled[u]]
        if problem.loss[u, f] < problem.loss[u, filled[u]] and np.all(used <= slack):
            slack -= used
            filled[u] = f
    return filled
