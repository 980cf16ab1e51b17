"""Dynamic programming over a discretised budget.

What the budget leaves above the cheapest choice is cut into n cells, every candidate's extra cost is rounded up to
whole cells, and

    best[u, b] = min_f best[u - 1, b - cells[u, f]] + loss[u, f],   b = 0..n

gives the optimum of the rounded problem; rounding up keeps it feasible. Where the common divisor of all costs is a
cell, nothing is rounded and the answer is the optimum of the problem itself.

Complexity: O(U F n) time, O(U n) memory, n at most MAX_CELLS and MAX_TABLE / U. Limits: one limit that can bind; with
n cells for U units every unit may waste a cell, which is all of the budget when U is near n.
Source: R. Bellman, "Dynamic Programming", 1957.
"""

import numpy as np

from solvers.certification import run_certified
from solvers.convex_hull import find_cost_quantum
from solvers.dual_bound import answer_with_dual_bound, find_dual_bound
from solvers.knapsack import check_one_budget
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, FloatArray, IntArray
from solvers.result import Answer, SolveResult

MAX_CELLS = 10_000
MAX_TABLE = 2**26


def solve_budget_grid(problem: AllocationProblem, params: SolveParams) -> SolveResult:
    """Returns the optimum on a grid of budgets, with the Lagrangian bound, or its own where nothing is rounded.

    Raises:
        ValueError: the problem has interactions, or several limits that can bind.
    """
    return run_certified(problem, params, solver="budget_grid", search=search_budget_grid)


def search_budget_grid(problem: AllocationProblem, params: SolveParams) -> Answer:
    """Returns the answer of the budget_grid solver."""
    check_one_budget(problem, "budget_grid")
    dual = find_dual_bound(problem)
    if not problem.binding:
        choice = problem.masked_loss.argmin(axis=1)
        return answer_with_dual_bound(problem, choice, dual, detail="every unit at its least loss")
    cells, n_cells, exact = _discretise(problem, problem.binding[0])
    choice = minimise_on_grid(problem.masked_loss, cells, n_cells)
    optimum = float(problem.loss[np.arange(choice.size), choice].sum())
    return answer_with_dual_bound(
        problem,
        choice,
        dual,
        detail=f"dynamic programming over {n_cells} cells, costs {'as they are' if exact else 'rounded up'}",
        lower_bound=optimum if exact else -np.inf,
    )


def minimise_on_grid(loss: FloatArray, cells: IntArray, n_cells: int) -> IntArray:
    """Returns the choice [U] of least summed loss that uses at most n_cells.

    Args:
        loss: inf where not allowed, [U, F].
        cells: whole cells of every candidate, [U, F]; every unit has an allowed one of 0.
        n_cells: cells of the budget, at least 0.
    """
    n_units, n_formats = loss.shape
    taken = np.zeros((n_units, n_cells + 1), dtype=np.uint8 if n_formats <= 256 else np.int64)
    best = np.zeros(n_cells + 1)
    for u in range(n_units):
        following = np.full(n_cells + 1, np.inf)
        for f in np.flatnonzero(np.isfinite(loss[u]) & (cells[u] <= n_cells)):
            k = int(cells[u, f])
            total = best[: n_cells + 1 - k] + loss[u, f]
            better = total < following[k:]
            following[k:][better] = total[better]
            taken[u, k:][better] = f
        best = following
    choice = np.zeros(n_units, dtype=np.int64)
    left = n_cells
    for u in range(n_units - 1, -1, -1):
        choice[u] = taken[u, left]
        left -= int(cells[u, choice[u]])
    return choice


def _discretise(problem: AllocationProblem, resource: int) -> tuple[IntArray, int, bool]:
    """Returns the cells of every candidate [U, F], those of the budget, and whether nothing was rounded."""
    loss, cost = problem.masked_loss, problem.masked_cost[resource]
    least = np.where(problem.allowed, cost, np.inf).min(axis=1, keepdims=True)
    extra = np.where(problem.allowed, cost - least, 0.0)
    left = max(float(problem.target[resource] - problem.least_use[resource]), 0.0)
    n_cells = max(min(MAX_CELLS, MAX_TABLE // problem.n_units), 1)
    quantum = find_cost_quantum(cost, loss)
    if quantum > 0 and left / quantum <= n_cells:
        return (extra / quantum).astype(np.int64), int(left / quantum), True
    if left == 0.0:
        return np.where(extra > 0, 1, 0).astype(np.int64), 0, True
    cells = np.minimum(np.ceil(extra / (left / n_cells)), n_cells + 1)
    return cells.astype(np.int64), n_cells, False
