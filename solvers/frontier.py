"""All efficient points of one budget: the same problem at many limits.

Limits are taken from the smallest up. With one limit that can bind, hull and sort are done once, and every point
costs one exact search of its core. Otherwise every solve starts from the choices of the limits below, which keep
its limit too: no point is worse than one of a smaller limit.

Complexity: O(U F^2 + N log N) once and O(U F) plus an exact search per point; otherwise one solve per point.
"""

from dataclasses import replace

import numpy as np

from solvers.certification import run_certified
from solvers.convex_hull import ConvexHull, build_hull
from solvers.dispatch import solve
from solvers.knapsack import search_hull
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, FloatArray
from solvers.result import Answer, SolveResult


def solve_frontier(
    problem: AllocationProblem,
    *,
    resource: str | None = None,
    limits: FloatArray | None = None,
    n_points: int | None = None,
    params: SolveParams | None = None,
) -> tuple[SolveResult, ...]:
    """Returns one result per limit, in the order of the limits, each with its bound and shadow price.

    Args:
        problem: the problem; its limit on `resource` is replaced by each of the limits, the others hold.
        resource: name of the resource to sweep; may be left out when there is only one.
        limits: limits to solve for, [P].
        n_points: instead of limits: this many, evenly spaced from the least use to the use at the least loss.
        params: settings of every solve.

    Raises:
        ValueError: an unknown resource, or not exactly one of limits and n_points, or n_points below 2.
    """
    params = params or SolveParams()
    given = params.starts
    index = _find_resource(problem.resources, resource)
    limits = _list_limits(problem, index, limits, n_points)
    # Which of the others matter must not depend on this limit, which changes.
    unlimited = np.where(np.arange(problem.limit.size) == index, np.inf, problem.limit)
    others = replace(problem, limit=unlimited).binding
    single = problem.is_separable and not others and params.trust_region is None
    hull = build_hull(problem.masked_loss, problem.masked_cost[index]) if single else None
    results: dict[int, SolveResult] = {}
    for i in np.argsort(limits, kind="stable"):
        at_limit = problem.limit.copy()
        at_limit[index] = limits[i]
        point = replace(problem, limit=at_limit)
        if hull is not None:
            results[int(i)] = _solve_point(point, index, hull, params)
            continue
        result = solve(point, params=params)
        results[int(i)] = result
        if result.choice is not None:
            params = replace(params, starts=(*given, result.choice))
    return tuple(results[i] for i in range(limits.size))


def list_efficient(results: tuple[SolveResult, ...], *, resource: str | None = None) -> tuple[SolveResult, ...]:
    """Returns the efficient results, least use first: those that no other matches in both use and objective.

    Of results with the same use and objective the first counts; results without a choice never do.

    Args:
        results: as `solve_frontier` returns them.
        resource: name of the resource swept; may be left out when there is only one.

    Raises:
        ValueError: an unknown resource.
    """
    found = [result for result in results if result.choice is not None]
    if not found:
        return ()
    index = _find_resource(found[0].resources, resource)
    efficient: list[SolveResult] = []
    for result in sorted(found, key=lambda result: (float(result.use[index]), result.objective)):
        if not efficient or result.objective < efficient[-1].objective:
            efficient.append(result)
    return tuple(efficient)


def _solve_point(problem: AllocationProblem, index: int, hull: ConvexHull, params: SolveParams) -> SolveResult:
    def search(problem: AllocationProblem, params: SolveParams) -> Answer:
        choice, lower_bound, price, outcome = search_hull(hull, float(problem.target[index]), params)
        shadow_price = np.zeros(len(problem.resources))
        shadow_price[index] = price
        return Answer(
            choice=choice,
            lower_bound=lower_bound,
            shadow_price=shadow_price,
            limit_hit=outcome.limit_hit,
            detail=f"frontier point on a shared hull, exact search over {outcome.n_states} states",
        )

    return run_certified(problem, params, solver="knapsack", search=search)


def _find_resource(resources: tuple[str, ...], resource: str | None) -> int:
    if resource is None and len(resources) == 1:
        return 0
    if resource not in resources:
        msg = f"resource must be one of {', '.join(resources)}: got resource={resource!r}."
        raise ValueError(msg)
    return resources.index(resource)


def _list_limits(problem: AllocationProblem, index: int, limits: FloatArray | None, n_points: int | None) -> FloatArray:
    if (limits is None) == (n_points is None):
        msg = f"exactly one of limits and n_points must be given: got limits={limits}, n_points={n_points}."
        raise ValueError(msg)
    if limits is not None:
        return np.asarray(limits, dtype=np.float64)
    if n_points is None or n_points < 2:
        msg = f"n_points must be at least 2: got n_points={n_points}."
        raise ValueError(msg)
    # The use at the least loss: beyond it a larger limit changes nothing.
    tied = problem.masked_loss == problem.masked_loss.min(axis=1, keepdims=True)
    full = np.where(tied, problem.masked_cost[index], np.inf).min(axis=1).sum()
    return np.linspace(problem.least_use[index], full, n_points)
