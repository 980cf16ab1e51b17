"""Every choice, one by one: the oracle that the other solvers are tested against.

The units are split into two halves of about sqrt(N) choices each; losses, uses and sketch sums of the halves
are tabulated, and the N combinations are sums (and, for interactions, inner products) of two tables.

Complexity: O(N (R + S)) for N = product of allowed formats; refused above MAX_CHOICES.
"""

import numpy as np

from solvers.certification import run_certified
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, BoolArray, FloatArray, IntArray
from solvers.products import contract
from solvers.result import Answer, SolveResult

MAX_CHOICES = 2_000_000


def solve_exhaustive(problem: AllocationProblem, params: SolveParams) -> SolveResult:
    """Returns the optimum by trying every choice.

    Raises:
        ValueError: more than MAX_CHOICES choices.
    """
    n_choices = float(np.prod(problem.allowed.sum(axis=1).astype(np.float64)))
    if n_choices > MAX_CHOICES:
        msg = f"exhaustive must be given at most {MAX_CHOICES} choices: got {n_choices:.3g}. Use knapsack."
        raise ValueError(msg)
    return run_certified(problem, params, solver="exhaustive", search=search_exhaustive)


def search_exhaustive(problem: AllocationProblem, params: SolveParams) -> Answer:
    """Returns the answer of the exhaustive solver."""
    split = _find_split(problem.allowed.sum(axis=1))
    left = _list_choices(problem.allowed[:split])
    right = _list_choices(problem.allowed[split:])
    objective = _tabulate_objective(problem, left, right)
    feasible = np.ones(objective.shape, dtype=bool)
    # All that can be exceeded, so that this stays independent of which limits others leave out.
    for r in np.flatnonzero(problem.most_use > problem.target):
        feasible &= _tabulate_use(problem.cost[r], left, right) <= problem.target[r]
    best = int(np.where(feasible, objective, np.inf).argmin())
    if not feasible.any():
        least_excess = _find_least_excess(problem, left, right)
        return Answer(
            choice=None,
            lower_bound=np.inf,
            shadow_price=None,
            limit_hit=None,
            detail=f"none of {objective.size} choices keeps every limit",
            resource_at_fault=problem.resources[int(np.argmax(least_excess))],
        )
    row, column = divmod(best, objective.shape[1])
    return Answer(
        choice=np.concatenate([left[row], right[column]]),
        lower_bound=float(objective[row, column]),
        shadow_price=None,
        limit_hit=None,
        detail=f"best of {objective.size} choices",
    )


def _find_split(counts: IntArray) -> int:
    """Returns the number of units in the first half, so that the halves have about equally many choices."""
    logs = np.log(counts.astype(np.float64))
    return int(np.searchsorted(np.cumsum(logs), logs.sum() / 2, side="left")) + 1 if counts.size > 1 else 1


def _list_choices(allowed: BoolArray) -> IntArray:
    """Returns all choices of the given units, int64 [N, units]."""
    formats = [np.flatnonzero(row) for row in allowed]
    if not formats:
        return np.zeros((1, 0), dtype=np.int64)
    grids = np.meshgrid(*formats, indexing="ij")
    return np.stack([grid.ravel() for grid in grids], axis=1)


def _sum_chosen(table: FloatArray, choices: IntArray) -> FloatArray:
    return np.asarray(table[np.arange(table.shape[0]), choices].sum(axis=1))


def _tabulate_objective(problem: AllocationProblem, left: IntArray, right: IntArray) -> FloatArray:
    """Returns the objective of every pair of half choices, [N_left, N_right]."""
    split = left.shape[1]
    halves = [(left, slice(0, split)), (right, slice(split, None))]
    sums, own = [], []
    for choices, units in halves:
        total = _sum_chosen(problem.loss[units], choices)
        if not problem.is_separable and problem.sketch is not None:
            sketch = problem.sketch[:, units].astype(np.float64)
            vectors = sketch[:, np.arange(sketch.shape[1]), choices]
            summed = vectors.sum(axis=2).T
            pairs = 0.5 * (np.sum(summed**2, axis=1) - np.sum(vectors**2, axis=(0, 2)))
            total += problem.interaction_scale * pairs
            sums.append(summed)
        own.append(total)
    objective = own[0][:, None] + own[1]
    return objective + problem.interaction_scale * contract("is,js->ij", *sums) if sums else objective


def _tabulate_use(cost: FloatArray, left: IntArray, right: IntArray) -> FloatArray:
    """Returns the use of a resource with cost [U, F] by every pair of half choices, [N_left, N_right]."""
    split = left.shape[1]
    return _sum_chosen(cost[:split], left)[:, None] + _sum_chosen(cost[split:], right)


def _find_least_excess(problem: AllocationProblem, left: IntArray, right: IntArray) -> FloatArray:
    """Returns each limit's relative excess at the choice that exceeds the limits least in sum, [R]."""
    excess = []
    for r, limit in enumerate(problem.target):
        use = _tabulate_use(problem.cost[r], left, right)
        scale = max(abs(float(limit)), 1e-300) if np.isfinite(limit) else 1.0
        excess.append(np.maximum(use - limit, 0.0) / scale)
    at = int(np.sum(excess, axis=0).argmin())
    return np.array([table.ravel()[at] for table in excess])
