"""Further constraints, compiled into resources and masks: every solver keeps and certifies them.

    at most k units of format f in a group      cost 1 at (u, f),                      limit k
    at least k                                  cost 1 at (u, g != f),                 limit |group| - k
    budget of a group                           the resource's cost inside the group,  its limit
    mean width of a group at most m             n[u] bits[u, f],                       m sum n
    mean width at least m                       n[u] (b - bits[u, f]), b the largest,  (b - m) sum n
    fixed unit                                  only its format is allowed

A constraint becomes one more resource with a name of its own, so that an infeasible result names it and a shadow
price prices it. Ties merge units instead: see `ties`.

Complexity: one [U, F] table per constraint. Limits: with several resources the exact solvers are `milp` and
`lagrangian`, not `knapsack`.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from solvers.dispatch import solve
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, BoolArray, FloatArray
from solvers.result import SolveResult


@dataclass(frozen=True, kw_only=True, eq=False)
class CountLimit:
    """At least and at most so many units of one format in a group.

    Args:
        name: unique name.
        units: the group, bool [U].
        format_index: the format counted.
        at_least: least number of units.
        at_most: most number of units; None for no such limit.
    """

    name: str
    units: BoolArray
    format_index: int
    at_least: int = 0
    at_most: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupBudget:
    """A limit on one resource inside a group of units (a block, a role).

    Args:
        name: unique name.
        units: the group, bool [U].
        resource: name of the problem's resource.
        limit: the most that the group may use of it.
    """

    name: str
    units: BoolArray
    resource: str
    limit: float


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanWidth:
    """Least and most mean bits per weight of a group of units.

    Args:
        name: unique name.
        units: the group, bool [U].
        bits: bits per weight of every candidate, [U, F], or of every format, [F].
        n_weights: weights of every unit, [U].
        at_least: least mean; 0 for no such limit.
        at_most: most mean; inf for no such limit.
    """

    name: str
    units: BoolArray
    bits: FloatArray
    n_weights: FloatArray
    at_least: float = 0.0
    at_most: float = math.inf


Constraint = CountLimit | GroupBudget | MeanWidth
Row = tuple[str, FloatArray, float]


def add_constraints(problem: AllocationProblem, constraints: tuple[Constraint, ...]) -> AllocationProblem:
    """Returns the problem with one more resource per side of every constraint, in their order.

    The resources are named "<name> at least" and "<name> at most".

    Raises:
        ValueError: a group or table of the wrong shape, an unknown format or resource, or a name used twice.
    """
    rows = [row for constraint in constraints for row in _compile(problem, constraint)]
    if not rows:
        return problem
    return replace(
        problem,
        cost=np.concatenate([problem.cost, np.stack([cost for _, cost, _ in rows])]),
        limit=np.append(problem.limit, [limit for _, _, limit in rows]),
        resources=(*problem.resources, *(name for name, _, _ in rows)),
    )


def fix_units(problem: AllocationProblem, fixed: dict[int, int]) -> AllocationProblem:
    """Returns the problem with only one format allowed in every fixed unit.

    Args:
        fixed: unit -> format, both indices.

    Raises:
        ValueError: a unit or format outside the problem, or a format that the unit is not allowed.
    """
    allowed = problem.allowed.copy()
    for unit, chosen in fixed.items():
        inside = 0 <= unit < problem.n_units and 0 <= chosen < problem.n_formats
        if not inside or not problem.allowed[unit, chosen]:
            msg = f"fixed must name an allowed format of a unit: got format={chosen} in unit={unit}."
            raise ValueError(msg)
        allowed[unit] = False
        allowed[unit, chosen] = True
    return replace(problem, allowed=allowed)


def solve_constrained(
    problem: AllocationProblem,
    constraints: tuple[Constraint, ...],
    *,
    solver: str = "auto",
    params: SolveParams | None = None,
) -> SolveResult:
    """Returns the result under further constraints, its arrays over the problem's own resources.

    `resource_at_fault` may name a constraint. For the constraints' own use and shadow prices, solve
    `add_constraints(problem, constraints)`.

    Args:
        constraints: counts, group budgets and mean widths.
        solver: as `solve`.
        params: as `solve`.

    Raises:
        ValueError: as `add_constraints` and `solve`.
    """
    result = solve(add_constraints(problem, constraints), solver=solver, params=params)
    return trim_resources(result, len(problem.resources))


def trim_resources(result: SolveResult, n_resources: int) -> SolveResult:
    """Returns the result with only its first n_resources resources."""
    return replace(
        result,
        use=result.use[:n_resources],
        shadow_price=result.shadow_price[:n_resources],
        least_use=result.least_use[:n_resources],
        resources=result.resources[:n_resources],
    )


def _compile(problem: AllocationProblem, constraint: Constraint) -> list[Row]:
    """Returns name, cost [U, F] and limit of every resource that a constraint becomes."""
    if constraint.units.shape != (problem.n_units,) or constraint.units.dtype != np.bool_:
        found = f"{constraint.units.dtype} {constraint.units.shape}"
        msg = f"units must be bool of shape ({problem.n_units},): got {found} in constraint {constraint.name!r}."
        raise ValueError(msg)
    if isinstance(constraint, CountLimit):
        return _compile_count(problem, constraint)
    if isinstance(constraint, GroupBudget):
        return _compile_budget(problem, constraint)
    return _compile_width(problem, constraint)


def _compile_count(problem: AllocationProblem, constraint: CountLimit) -> list[Row]:
    if not 0 <= constraint.format_index < problem.n_formats:
        msg = (
            f"format_index must be from 0 to {problem.n_formats - 1}: got "
            f"format_index={constraint.format_index} in constraint {constraint.name!r}."
        )
        raise ValueError(msg)
    inside = np.where(constraint.units[:, None], 1.0, 0.0)
    counted = inside * (np.arange(problem.n_formats) == constraint.format_index)
    rows: list[Row] = []
    if constraint.at_least > 0:
        others = float(np.count_nonzero(constraint.units) - constraint.at_least)
        rows.append((f"{constraint.name} at least", inside - counted, others))
    if constraint.at_most is not None:
        rows.append((f"{constraint.name} at most", counted, float(constraint.at_most)))
    return rows


def _compile_budget(problem: AllocationProblem, constraint: GroupBudget) -> list[Row]:
    if constraint.resource not in problem.resources:
        msg = (
            f"resource must be one of {', '.join(problem.resources)}: got resource={constraint.resource!r} "
            f"in constraint {constraint.name!r}."
        )
        raise ValueError(msg)
    cost = problem.cost[problem.resources.index(constraint.resource)]
    return [(f"{constraint.name} at most", np.where(constraint.units[:, None], cost, 0.0), constraint.limit)]


def _compile_width(problem: AllocationProblem, constraint: MeanWidth) -> list[Row]:
    shapes = (constraint.bits.shape, constraint.n_weights.shape)
    if shapes[0] not in ((problem.n_formats,), problem.loss.shape) or shapes[1] != (problem.n_units,):
        msg = (
            f"bits must be [F] or [U, F] and n_weights [U] of {problem.loss.shape}: got {shapes} "
            f"in constraint {constraint.name!r}."
        )
        raise ValueError(msg)
    bits = np.broadcast_to(constraint.bits, problem.loss.shape)
    weights = np.where(constraint.units, constraint.n_weights, 0.0)
    total = float(weights.sum())
    rows: list[Row] = []
    if constraint.at_least > 0:
        most = float(bits[problem.allowed].max())
        short = np.where(problem.allowed, weights[:, None] * (most - bits), 0.0)
        rows.append((f"{constraint.name} at least", short, (most - constraint.at_least) * total))
    if math.isfinite(constraint.at_most):
        rows.append((f"{constraint.name} at most", weights[:, None] * bits, constraint.at_most * total))
    return rows
