"""Two-group ratio sweep: split the budget between two groups of units, and plan each group by itself.

Losses of the two groups may be of different kinds (MixDQ: picture content and picture quality), so that they cannot
be traded within one sum. With r = n_first / n_second (weights) and k = bits of the first group over bits of the
second, the shares of every limit are

    first = k r / (k r + 1),    second = 1 / (k r + 1).

One plan per k comes back, for the caller to measure; `solve_ratio_sweep` takes the least summed loss instead.

Complexity: two solves per ratio. Limits: the split is a guess per k; a common sum would do better where it exists.
Source: T. Zhao et al., "MixDQ", arXiv 2405.17873 (k from 0.46 to 1.36 in 10 steps for weights).
"""

from dataclasses import dataclass, replace

import numpy as np

from solvers.certification import run_certified
from solvers.dispatch import solve
from solvers.dual_bound import answer_with_dual_bound, find_dual_bound
from solvers.knapsack import check_separable
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, BoolArray, FloatArray, IntArray
from solvers.result import Answer, SolveResult

RATIOS = tuple(np.linspace(0.46, 1.36, 10).tolist())


@dataclass(frozen=True, kw_only=True, eq=False)
class RatioPlan:
    """The plan of one split.

    Args:
        ratio: bits of the first group over bits of the second, k.
        share: part of every limit that the first group gets.
        choice: format index per unit, [U]; None when a group cannot keep its share.
    """

    ratio: float
    share: float
    choice: IntArray | None


def sweep_ratios(
    problem: AllocationProblem,
    params: SolveParams,
    *,
    in_first: BoolArray,
    n_weights: FloatArray,
    ratios: tuple[float, ...] = RATIOS,
) -> tuple[RatioPlan, ...]:
    """Returns one plan per ratio, in their order.

    Args:
        in_first: units of the first group, [U]; the others are the second, and neither is empty.
        n_weights: weights of every unit, above 0, [U].
        ratios: the k to try, above 0.

    Raises:
        ValueError: interactions, an empty group, weights or ratios that are not above 0.
    """
    check_separable(problem, "ratio_sweep")
    if in_first.all() or not in_first.any():
        msg = f"in_first must leave units in both groups: got {int(in_first.sum())} of {in_first.size} units."
        raise ValueError(msg)
    if np.any(n_weights <= 0) or any(ratio <= 0 for ratio in ratios):
        msg = f"n_weights and ratios must be above 0: got least weight {n_weights.min()}, ratios={ratios}."
        raise ValueError(msg)
    relative_size = float(n_weights[in_first].sum() / n_weights[~in_first].sum())
    plans = []
    for ratio in ratios:
        share = ratio * relative_size / (ratio * relative_size + 1.0)
        choice = _solve_groups(problem, params, in_first, share)
        plans.append(RatioPlan(ratio=ratio, share=share, choice=choice))
    return tuple(plans)


def solve_ratio_sweep(
    problem: AllocationProblem,
    params: SolveParams,
    *,
    in_first: BoolArray,
    n_weights: FloatArray,
    ratios: tuple[float, ...] = RATIOS,
) -> SolveResult:
    """Returns the plan of least summed loss over the ratios, with the Lagrangian bound of the whole problem.

    Args:
        in_first: as `sweep_ratios`, [U].
        n_weights: as `sweep_ratios`, [U].
        ratios: as `sweep_ratios`.

    Raises:
        ValueError: as `sweep_ratios`.
    """

    def search(problem: AllocationProblem, params: SolveParams) -> Answer:
        plans = sweep_ratios(problem, params, in_first=in_first, n_weights=n_weights, ratios=ratios)
        rows = np.arange(problem.n_units)
        choices = [plan.choice for plan in plans if plan.choice is not None]
        best = min(choices, key=lambda choice: float(problem.loss[rows, choice].sum()), default=None)
        detail = f"two groups, {len(choices)} of {len(plans)} ratios can be kept"
        return answer_with_dual_bound(problem, best, find_dual_bound(problem), detail=detail)

    return run_certified(problem, params, solver="ratio_sweep", search=search)


def _solve_groups(
    problem: AllocationProblem, params: SolveParams, in_first: BoolArray, share: float
) -> IntArray | None:
    choice = np.zeros(problem.n_units, dtype=np.int64)
    plain = replace(params, starts=(), trust_region=None, validation_sketch=None)
    for units, part in ((in_first, share), (~in_first, 1.0 - share)):
        group = AllocationProblem(
            loss=problem.loss[units],
            cost=problem.cost[:, units],
            limit=problem.limit * part,
            allowed=problem.allowed[units],
            resources=problem.resources,
        )
        found = solve(group, params=plain).choice
        if found is None:
            return None
        choice[units] = found
    return choice
