"""The Lagrangian bound of any separable problem, for algorithms that prove nothing themselves.

One limit that can bind: the price at which the relaxation breaks (`convex_hull`); several: `dual`. The bound is
recomputed at these prices by `check.compute_dual_bound`, so that anyone can repeat it.
"""

from dataclasses import dataclass

import numpy as np

from solvers.check import compute_dual_bound
from solvers.convex_hull import build_hull, relax
from solvers.dual import maximise_dual
from solvers.milp import report_joint_infeasibility
from solvers.problem import AllocationProblem, FloatArray, IntArray
from solvers.result import Answer


@dataclass(frozen=True, kw_only=True, eq=False)
class DualBound:
    """Prices of all resources, [R], the bound they prove, and whether that bound exceeds every choice's loss."""

    price: FloatArray
    bound: float
    proves_infeasible: bool


def find_dual_bound(problem: AllocationProblem) -> DualBound:
    """Returns the best prices found for a separable problem whose limits can be kept one by one."""
    price, binding = np.zeros(len(problem.resources)), list(problem.binding)
    proves_infeasible = False
    if len(binding) == 1:
        hull = build_hull(problem.masked_loss, problem.masked_cost[binding[0]])
        price[binding] = relax(hull, float(problem.target[binding[0]])).price
    elif binding:
        dual = maximise_dual(problem.masked_loss, problem.masked_cost[binding], problem.target[binding])
        price[binding], proves_infeasible = dual.price, dual.proves_infeasible
    bound = compute_dual_bound(problem, price)
    return DualBound(price=price, bound=bound, proves_infeasible=proves_infeasible)


def answer_with_dual_bound(
    problem: AllocationProblem,
    choice: IntArray | None,
    dual: DualBound,
    *,
    detail: str,
    lower_bound: float = -np.inf,
) -> Answer:
    """Returns the answer of an algorithm that proves nothing, or joint infeasibility where the dual proves that.

    Args:
        choice: feasible choice [U]; None when the algorithm found none.
        detail: what the algorithm did.
        lower_bound: a bound that the algorithm proved nevertheless; the greater of the two is reported.
    """
    if dual.proves_infeasible and choice is None:
        price = dual.price[list(problem.binding)]
        return report_joint_infeasibility(problem, price, "the Lagrangian bound exceeds every loss")
    return Answer(
        choice=choice,
        lower_bound=max(dual.bound, lower_bound),
        shadow_price=dual.price,
        limit_hit="iterations",
        detail=f"{detail}; bound by the Lagrangian dual",
    )
