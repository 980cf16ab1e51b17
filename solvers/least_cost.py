"""The other direction: the least use of one resource with a summed loss at most x.

    minimise  sum_u cost[r, u, c_u]   subject to  sum_u loss[u, c_u] <= x  and the other limits

is the same problem with two roles exchanged: the cost of resource r becomes the objective, the loss a
resource. Losses may be negative and costs may not, so every unit's losses are shifted by its least, and x
by their sum.
"""

import math
from dataclasses import replace

import numpy as np

from solvers.dispatch import solve
from solvers.params import SolveParams
from solvers.problem import AllocationProblem
from solvers.result import SolveResult

LOSS = "loss"


def solve_least_cost(
    problem: AllocationProblem,
    *,
    resource: str,
    max_loss: float,
    solver: str = "auto",
    params: SolveParams | None = None,
) -> SolveResult:
    """Returns the least use of a resource with a summed loss of at most max_loss.

    Args:
        problem: a separable problem; its limit on `resource` is ignored, its other limits hold.
        resource: name of the resource to minimise.
        max_loss: most summed loss, nats per token.
        solver: name of the solver, as in `solve`.
        params: settings, as in `solve`.

    Returns:
        A result whose `objective` and `lower_bound` are uses of `resource`, and whose `resources` are
        ("loss", and the others in their order): `use[0]` is the summed loss in nats per token,
        `shadow_price[0]` what one more nat saves of the resource, `least_use[0]` the least reachable loss.

    Raises:
        ValueError: an unknown resource, a resource named "loss", a max_loss that is not a number, or
            interactions.
    """
    exchanged, shift = exchange_roles(problem, resource=resource, max_loss=max_loss)
    result = solve(exchanged, solver=solver, params=params or SolveParams())
    use, least_use = result.use.copy(), result.least_use.copy()
    least_use[0] += shift
    if result.choice is not None:
        use[0] = math.fsum(problem.loss[np.arange(problem.n_units), result.choice].tolist())
    detail = f"least {resource} by exchange of loss and cost; {result.detail}"
    return replace(result, use=use, least_use=least_use, detail=detail)


def exchange_roles(problem: AllocationProblem, *, resource: str, max_loss: float) -> tuple[AllocationProblem, float]:
    """Returns the exchanged problem, and the sum of the units' least losses that its loss limit is short of.

    Raises:
        ValueError: as `solve_least_cost`.
    """
    if resource not in problem.resources:
        msg = f"resource must be one of {', '.join(problem.resources)}: got resource={resource!r}."
        raise ValueError(msg)
    if LOSS in problem.resources:
        msg = f"no resource may be named {LOSS!r} here, the name of the exchanged one: got {problem.resources}."
        raise ValueError(msg)
    if math.isnan(max_loss):
        msg = f"max_loss must be a number or inf: got max_loss={max_loss}."
        raise ValueError(msg)
    if not problem.is_separable:
        msg = "least cost must be given a problem without interactions: got a sketch. Drop the sketch."
        raise ValueError(msg)
    index = problem.resources.index(resource)
    others = [r for r in range(len(problem.resources)) if r != index]
    least = problem.masked_loss.min(axis=1)
    shift = math.fsum(least.tolist())
    exchanged = AllocationProblem(
        loss=np.ascontiguousarray(problem.masked_cost[index]),
        cost=np.concatenate(
            [np.where(problem.allowed, problem.loss - least[:, None], 0.0)[None], problem.cost[others]]
        ),
        limit=np.concatenate([[max_loss - shift], problem.limit[others]]),
        allowed=problem.allowed,
        resources=(LOSS, *(problem.resources[r] for r in others)),
    )
    return exchanged, shift
