"""What can be reached at all: the smallest value of each limit, exactly, for budgets that nothing keeps."""

import math
from collections.abc import Mapping

from runtime.costs import CostTable
from solvers import AllocationProblem, solve, solve_least_cost

MAX_KL = "max_kl"


def find_least_values(
    problem: AllocationProblem,
    limits: Mapping[str, float],
    tables: Mapping[str, CostTable],
    *,
    max_loss: float | None = None,
) -> dict[str, float]:
    """Returns limit -> its smallest reachable value with the other limits kept; on its own where they cannot be.

    A budget with one of these values in the place of the limit it belongs to, and the others as they were, is
    reachable whenever the others can be kept together.

    Args:
        problem: The problem under the limits.
        limits: Resource -> limit of the whole model.
        tables: Resource -> cost table.
        max_loss: Ceiling on the summed loss, or None.
    """
    ceiling = math.inf if max_loss is None else max_loss
    least = {name: _least_use(problem, name, ceiling) + tables[name].fixed for name in limits}
    if max_loss is not None:
        result = solve(problem)
        alone = math.fsum(problem.masked_loss.min(axis=1).tolist())
        least[MAX_KL] = alone if result.choice is None else result.objective
    return least


def _least_use(problem: AllocationProblem, name: str, ceiling: float) -> float:
    result = solve_least_cost(problem, resource=name, max_loss=ceiling)
    if result.choice is not None:
        return result.objective
    return float(problem.least_use[problem.resources.index(name)])
