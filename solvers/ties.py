"""Units that must agree on their format: merged into one before the solve, expanded after.

A merged unit's loss and cost are the sums of its members', a format is allowed where all members allow it, its sketch
is the sum of their sketches, and the interactions among its members, which no longer are between units, move into
its loss:

    loss[m, f] = sum_u loss[u, f] + rho sum_{u < v} <sketch[:, u, f], sketch[:, v, f]>,   u, v members of m.

So the objective of a merged choice is that of the expanded one, and every bound carries over.

Complexity: O(S U F).
"""

from dataclasses import dataclass, replace

import numpy as np

from solvers.dispatch import solve
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, FloatArray, IntArray
from solvers.result import SolveResult


@dataclass(frozen=True, kw_only=True, eq=False)
class TiedProblem:
    """A problem over merged units, and the merged unit of every original one, int64 [U]."""

    problem: AllocationProblem
    merged_unit: IntArray


def merge_ties(problem: AllocationProblem, ties: tuple[tuple[int, ...], ...]) -> TiedProblem:
    """Returns the problem over merged units, each at the place of its first member.

    Args:
        ties: groups of unit indices that must agree; a unit may be in one group at most.

    Raises:
        ValueError: an unknown unit, a unit tied twice, or members without a common format.
    """
    merged_unit = _number_units(problem.n_units, ties)
    n_merged = int(merged_unit.max()) + 1
    allowed = np.ones((n_merged, problem.n_formats), dtype=bool)
    np.logical_and.at(allowed, merged_unit, problem.allowed)
    stuck = np.flatnonzero(~allowed.any(axis=1))
    if stuck.size:
        members = np.flatnonzero(merged_unit == stuck[0]).tolist()
        msg = f"tied units must have a format in common: got none for units {members}. Untie them or allow one."
        raise ValueError(msg)
    loss = _sum_members(np.where(problem.allowed, problem.loss, 0.0), merged_unit, n_merged)
    cost = np.stack([_sum_members(table, merged_unit, n_merged) for table in problem.masked_cost])
    sketch = None
    if problem.sketch is not None:
        masked = np.where(problem.allowed, problem.sketch, 0.0).astype(np.float64)
        sketch = np.stack([_sum_members(table, merged_unit, n_merged) for table in masked])
        squares = _sum_members(np.sum(masked * masked, axis=0), merged_unit, n_merged)
        loss = loss + 0.5 * problem.interaction_scale * (np.sum(sketch * sketch, axis=0) - squares)
    merged = replace(problem, loss=loss, cost=cost, allowed=allowed, sketch=sketch)
    return TiedProblem(problem=merged, merged_unit=merged_unit)


def expand_choice(tied: TiedProblem, choice: IntArray) -> IntArray:
    """Returns the choice [U] of the original units from one of the merged units."""
    return choice[tied.merged_unit]


def merge_choice(tied: TiedProblem, choice: IntArray) -> IntArray:
    """Returns the choice of the merged units from one [U] of the original ones (the last member decides)."""
    merged = np.zeros(tied.problem.n_units, dtype=np.int64)
    merged[tied.merged_unit] = choice
    return merged


def solve_tied(
    problem: AllocationProblem,
    ties: tuple[tuple[int, ...], ...],
    *,
    solver: str = "auto",
    params: SolveParams | None = None,
) -> SolveResult:
    """Returns the result with tied units, its choice over the original units.

    Args:
        ties: as `merge_ties`.
        solver: as `solve`.
        params: as `solve`, for the merged units: without starts, trust region and validation sketch.

    Raises:
        ValueError: as `merge_ties` and `solve`.
    """
    tied = merge_ties(problem, ties)
    result = solve(tied.problem, solver=solver, params=params)
    if result.choice is None:
        return result
    detail = f"{problem.n_units} units merged into {tied.problem.n_units}; {result.detail}"
    return replace(result, choice=expand_choice(tied, result.choice), detail=detail)


def _number_units(n_units: int, ties: tuple[tuple[int, ...], ...]) -> IntArray:
    """Returns the merged unit of every unit, numbered in order of first members, [U]."""
    first = np.arange(n_units)
    seen: set[int] = set()
    for members in ties:
        repeated = seen.intersection(members) or len(set(members)) != len(members)
        if repeated or any(not 0 <= unit < n_units for unit in members):
            msg = f"ties must name each unit from 0 to {n_units - 1} once at most: got tie {members}."
            raise ValueError(msg)
        seen.update(members)
        first[list(members)] = min(members, default=0)
    numbers: IntArray = np.unique(first, return_inverse=True)[1].astype(np.int64)
    return numbers


def _sum_members(table: FloatArray, merged_unit: IntArray, n_merged: int) -> FloatArray:
    total = np.zeros((n_merged, table.shape[1]))
    np.add.at(total, merged_unit, table)
    return total
