"""Several near-optimal plans that differ, for verification by measurement.

Predicted losses are estimates; the plan of least predicted loss need not be the one of least measured loss. Plans
are found one after the other, each the best among those that differ from all before in at least d units:

    #{u : c[u] = plan_i[u]} <= U - d     for every plan i found,

which is one more resource per plan (cost 1 where a candidate is the plan's). So every plan comes with a bound of its
own, and when that bound passes epsilon, no further plan exists at that distance from those found.

Complexity: one solve per plan, with one more limit each. Limits: one after the other is not the most diverse set of
its size.
Source: E. Danna et al., "Generating multiple solutions for mixed integer programming problems", IPCO 2007.
"""

from dataclasses import dataclass, replace

import numpy as np

from solvers.constraints import trim_resources
from solvers.dispatch import solve
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, IntArray
from solvers.result import SolveResult, Termination


@dataclass(frozen=True, kw_only=True, eq=False)
class DiversePlans:
    """Plans in the order found, which is that of their losses as far as each was solved to the end.

    Args:
        results: one result per plan; the bound of each holds among the plans that differ from those before it.
        complete: proved that no further plan differs from all of these and is within epsilon.
    """

    results: tuple[SolveResult, ...]
    complete: bool


def solve_diverse(
    problem: AllocationProblem,
    *,
    n_plans: int,
    relative_excess: float,
    min_changes: int,
    solver: str = "auto",
    params: SolveParams | None = None,
) -> DiversePlans:
    """Returns up to n_plans plans, each within the excess of the best and different from all before.

    Args:
        problem: the problem; when it is infeasible, its one result comes back, and `complete`.
        n_plans: the most plans to return, at least 1.
        relative_excess: epsilon; objectives up to best + epsilon |best| count, at least 0.
        min_changes: units in which two plans differ at least, 1..U.
        solver: as `solve`, for every plan.
        params: as `solve`, for every plan.

    Raises:
        ValueError: an argument outside its range, or as `solve`.
    """
    if n_plans < 1 or not relative_excess >= 0 or not 1 <= min_changes <= problem.n_units:
        msg = (
            f"n_plans must be at least 1, relative_excess at least 0, min_changes from 1 to {problem.n_units}: "
            f"got n_plans={n_plans}, relative_excess={relative_excess}, min_changes={min_changes}."
        )
        raise ValueError(msg)
    first = solve(problem, solver=solver, params=params)
    if first.choice is None:
        return DiversePlans(results=(first,), complete=first.termination is Termination.INFEASIBLE)
    most = first.objective + relative_excess * abs(first.objective)
    results, plans = [first], [first.choice]
    while len(results) < n_plans:
        result = solve(_exclude(problem, plans, min_changes), solver=solver, params=params)
        if result.choice is None or result.objective > most:
            none_left = result.termination is Termination.INFEASIBLE or result.lower_bound > most
            return DiversePlans(results=tuple(results), complete=none_left)
        results.append(trim_resources(result, len(problem.resources)))
        plans.append(result.choice)
    return DiversePlans(results=tuple(results), complete=False)


def _exclude(problem: AllocationProblem, plans: list[IntArray], min_changes: int) -> AllocationProblem:
    """Returns the problem with one more resource per plan, the units that agree with it."""
    formats = np.arange(problem.n_formats)
    agreeing = np.stack([(formats == plan[:, None]).astype(np.float64) for plan in plans])
    return replace(
        problem,
        cost=np.concatenate([problem.cost, agreeing]),
        limit=np.append(problem.limit, np.full(len(plans), float(problem.n_units - min_changes))),
        resources=(*problem.resources, *(f"agreement with plan {i}" for i in range(len(plans)))),
    )
