"""Rank and threshold: order units by sensitivity, give the least sensitive the low format.

Two formats, a ranking, a cut: LayerwiseQuant moves the n least important units from the high to the low format;
ShiftAddLLM cuts the ranking at given fractions, one per format. As a solver of an AllocationProblem the ranking is
by the loss that the low format adds, the cut is the least that keeps every limit, and every pair of formats is tried.

Complexity: O(F^2 U log U). Limits: at most two formats per plan, blind to unequal costs.
Sources: R. Dumitru et al., "Layer-wise quantization", arXiv 2406.17415; H. You et al., "ShiftAddLLM", arXiv
2406.05981 (whose code cuts at quantiles, where the paper describes an integer program).
"""

import itertools

import numpy as np

from solvers.certification import run_certified
from solvers.dual_bound import answer_with_dual_bound, find_dual_bound
from solvers.knapsack import check_separable
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, FloatArray, IntArray
from solvers.products import price_candidates
from solvers.result import Answer, SolveResult

FRACTION_TOLERANCE = 1e-9


def assign_by_rank(sensitivity: FloatArray, *, n_low: int, low: int, high: int) -> IntArray:
    """Returns the choice [U] with the low format in the n_low least sensitive units (ties: first unit first).

    Args:
        sensitivity: any score of the units, [U]; higher is more sensitive.
        n_low: number of units to give the low format, 0..U.
        low: format index.
        high: format index.

    Raises:
        ValueError: n_low outside 0..U.
    """
    if not 0 <= n_low <= sensitivity.size:
        msg = f"n_low must be from 0 to {sensitivity.size} units: got n_low={n_low}."
        raise ValueError(msg)
    choice = np.full(sensitivity.size, high, dtype=np.int64)
    choice[np.argsort(sensitivity, kind="stable")[:n_low]] = low
    return choice


def assign_by_quantiles(sensitivity: FloatArray, fractions: FloatArray) -> IntArray:
    """Returns the choice [U] that cuts the ranking at quantiles: the least sensitive get format 0, and so on.

    Args:
        sensitivity: any score of the units, [U].
        fractions: part of the units for every format, [F], at least 0, sum 1; ShiftAddLLM uses (0, 0.8, 0.2).

    Raises:
        ValueError: fractions below 0 or with another sum.
    """
    if np.any(fractions < 0) or abs(float(fractions.sum()) - 1.0) > FRACTION_TOLERANCE:
        msg = f"fractions must be at least 0 and sum to 1: got fractions={fractions.tolist()}."
        raise ValueError(msg)
    cuts = np.rint(np.cumsum(fractions) * sensitivity.size).astype(np.int64)
    choice = np.empty(sensitivity.size, dtype=np.int64)
    choice[np.argsort(sensitivity, kind="stable")] = np.searchsorted(cuts, np.arange(sensitivity.size), side="right")
    return choice


def solve_rank_threshold(problem: AllocationProblem, params: SolveParams) -> SolveResult:
    """Returns the best plan of two formats cut at one rank, with the Lagrangian bound.

    Raises:
        ValueError: the problem has interactions.
    """
    return run_certified(problem, params, solver="rank_threshold", search=search_rank_threshold)


def search_rank_threshold(problem: AllocationProblem, params: SolveParams) -> Answer:
    """Returns the answer of the rank_threshold solver."""
    check_separable(problem, "rank_threshold")
    best, best_loss = None, np.inf
    # A unit without the low or high format takes its cheapest, or its best.
    share = 1.0 / np.maximum(problem.most_use, 1e-300)
    priced = np.where(problem.allowed, price_candidates(share, problem.masked_cost), np.inf)
    spare_low, spare_high = priced.argmin(axis=1), problem.masked_loss.argmin(axis=1)
    pairs = [*itertools.permutations(range(problem.n_formats), 2), *((f, f) for f in range(problem.n_formats))]
    for low, high in pairs:
        low_choice = np.where(problem.allowed[:, low], low, spare_low)
        high_choice = np.where(problem.allowed[:, high], high, spare_high)
        choice = _cut(problem, low_choice, high_choice)
        if choice is None:
            continue
        loss = float(problem.loss[np.arange(choice.size), choice].sum())
        if loss < best_loss:
            best, best_loss = choice, loss
    detail = f"units ranked by added loss, best of {len(pairs)} pairs of formats"
    return answer_with_dual_bound(problem, best, find_dual_bound(problem), detail=detail)


def _cut(problem: AllocationProblem, low: IntArray, high: IntArray) -> IntArray | None:
    """Returns the choice with the fewest units moved from high to low that keeps the limits; None if none does."""
    rows = np.arange(problem.n_units)
    order = np.argsort(problem.loss[rows, low] - problem.loss[rows, high], kind="stable")
    cost_high, cost_low = problem.masked_cost[:, rows, high], problem.masked_cost[:, rows, low]
    moved = np.cumsum((cost_low - cost_high)[:, order], axis=1)
    use = cost_high.sum(axis=1)[:, None] + np.concatenate([np.zeros((moved.shape[0], 1)), moved], axis=1)
    for n_low in np.flatnonzero(np.all(use <= problem.ceiling[:, None], axis=0)):
        choice = high.copy()
        choice[order[:n_low]] = low[order[:n_low]]
        # Running sums round; the first cut may exceed a limit by that.
        if np.all(problem.masked_cost[:, rows, choice].sum(axis=1) <= problem.target):
            return choice
    return None
