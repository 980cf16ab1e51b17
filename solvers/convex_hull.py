"""Lower convex hulls of all units at once, and the linear relaxation of one budget read off from them.

For one resource, the relaxed problem (fractions of formats) uses only the candidates on the lower convex hull
of each unit's points (cost, loss). From the cheapest candidate of every unit, each hull edge is a step

    (cost_step > 0, loss_step < 0),   slope = loss_step / cost_step,

with slopes rising within a unit. Taking steps over all units in order of slope until the budget breaks is the
optimum of the relaxation; -slope of the first step that no longer fits is the shadow price. Candidates off
the hull are left to the exact search (`knapsack_core`): losses are neither convex nor monotone in general.

Complexity: O(U F^2) vectorised for the hulls, O(N log N) to sort N <= U (F - 1) steps, O(N) per budget.
Source: P. Sinha and A. Zoltners, "The multiple-choice knapsack problem", Operations Research 27 (1979).
"""

from dataclasses import dataclass

import numpy as np

from solvers.extremes import find_least
from solvers.problem import FloatArray, IntArray

EXACT_INTEGER = 2.0**53
"""Above this, float64 no longer holds every integer."""
QUANTUM_UNITS = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class ConvexHull:
    """The hulls of all units and their steps in order of slope; serves any limit.

    Args:
        loss: masked loss, inf where not allowed, [U, F].
        cost: masked cost of the one resource, 0 where not allowed, [U, F].
        vertices: format of the k-th hull point of every unit, padded with the last, [U, K].
        least_cost: use of the cheapest choice.
        unit: unit of every step, [N], in order of slope.
        slope: nats per unit of resource, negative, ascending, [N].
        cumulative_cost: use after taking the steps up to and including each, [N].
        cost_quantum: every reachable use is least_cost plus a multiple of this; 0 when there is no such step.
    """

    loss: FloatArray
    cost: FloatArray
    vertices: IntArray
    least_cost: float
    unit: IntArray
    slope: FloatArray
    cumulative_cost: FloatArray
    cost_quantum: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Relaxation:
    """The relaxation's optimum at one limit, rounded down.

    Args:
        choice: format per unit with every step before the break taken, feasible, [U].
        price: shadow price, nats per unit of resource, at least 0.
        slack: what the choice leaves of the (possibly sharpened) limit; 0 when all steps fit.
        break_unit: unit of the first step that does not fit; -1 when all steps fit.
        break_format: format that this step leads to; -1 when all steps fit.
    """

    choice: IntArray
    price: float
    slack: float
    break_unit: int
    break_format: int


def build_hull(loss: FloatArray, cost: FloatArray) -> ConvexHull:
    """Returns the hulls of masked loss and cost, both [U, F] (inf and 0 where not allowed)."""
    n_units = loss.shape[0]
    rows = np.arange(n_units)
    current = _find_cheapest(loss, cost)
    least_cost = float(np.sum(cost[rows, current]))
    columns = [current]
    units, slopes, cost_steps = [], [], []
    active, last_slope = rows, np.full(n_units, -np.inf)
    while active.size:
        following, slope = _find_steepest(loss[active], cost[active], columns[-1][active])
        moves = np.isfinite(slope)
        active, following = active[moves], following[moves]
        if not active.size:
            break
        # Rounding may make collinear points bend the wrong way; steps of a unit must stay in order.
        last_slope[active] = np.maximum(slope[moves], last_slope[active])
        cost_steps.append(cost[active, following] - cost[active, columns[-1][active]])
        column = columns[-1].copy()
        column[active] = following
        columns.append(column)
        units.append(active)
        slopes.append(last_slope[active])
    return _sort_steps(loss, cost, columns, least_cost, units, slopes, cost_steps)


def relax(hull: ConvexHull, limit: float) -> Relaxation:
    """Returns the relaxation's optimum at a limit that the cheapest choice keeps."""
    rows = np.arange(hull.loss.shape[0])
    if hull.cost_quantum > 0 and np.isfinite(limit):
        limit = hull.least_cost + hull.cost_quantum * np.floor((limit - hull.least_cost) / hull.cost_quantum)
    n_taken = int(np.searchsorted(hull.cumulative_cost, limit, side="right"))
    while True:
        depth = np.bincount(hull.unit[:n_taken], minlength=rows.size)
        choice = hull.vertices[rows, depth]
        slack = limit - float(np.sum(hull.cost[rows, choice]))
        # The running sum and this sum may round differently; give a step back rather than exceed the limit.
        if slack >= 0 or n_taken == 0:
            break
        n_taken -= 1
    if n_taken == hull.unit.size:
        return Relaxation(choice=choice, price=0.0, slack=0.0, break_unit=-1, break_format=-1)
    unit = int(hull.unit[n_taken])
    return Relaxation(
        choice=choice,
        price=float(-hull.slope[n_taken]),
        slack=max(slack, 0.0),
        break_unit=unit,
        break_format=int(hull.vertices[unit, depth[unit] + 1]),
    )


def find_cost_quantum(cost: FloatArray, loss: FloatArray) -> float:
    """Returns the greatest common divisor of cost differences within units; 0 unless integers."""
    if cost.max(initial=0.0) * cost.shape[0] >= EXACT_INTEGER or np.any(cost != np.floor(cost)):
        return 0.0
    # Most tables settle at their final divisor at once; look at a few units before looking at all.
    quantum = _find_divisor(cost[:QUANTUM_UNITS], loss[:QUANTUM_UNITS])
    if quantum != 1 and cost.shape[0] > QUANTUM_UNITS:
        quantum = _find_divisor(cost, loss)
    return float(quantum)


def _find_divisor(cost: FloatArray, loss: FloatArray) -> int:
    valid = np.isfinite(loss)
    least = find_least(np.where(valid, cost, np.inf))[:, None]
    return int(np.gcd.reduce(np.where(valid, cost - least, 0.0).astype(np.int64).ravel()))


def _find_cheapest(loss: FloatArray, cost: FloatArray) -> IntArray:
    """Returns the cheapest allowed format of every unit, ties broken by loss, [U]."""
    allowed_cost = np.where(np.isfinite(loss), cost, np.inf)
    least = find_least(allowed_cost)[:, None]
    return np.asarray(np.where(allowed_cost == least, loss, np.inf).argmin(axis=1))


def _find_steepest(loss: FloatArray, cost: FloatArray, current: IntArray) -> tuple[IntArray, FloatArray]:
    """Returns the next hull point of every unit and the slope to it, inf where the hull ends."""
    rows = np.arange(loss.shape[0])
    cost_step = cost - cost[rows, current][:, None]
    loss_step = loss - loss[rows, current][:, None]
    slope = np.full(loss.shape, np.inf)
    np.divide(loss_step, cost_step, out=slope, where=(cost_step > 0) & (loss_step < 0))
    steepest = find_least(slope)
    # Of collinear points take the farthest: fewer steps, the same hull.
    farthest = np.where(slope == steepest[:, None], cost_step, -np.inf).argmax(axis=1)
    return farthest, steepest


def _sort_steps(
    loss: FloatArray,
    cost: FloatArray,
    columns: list[IntArray],
    least_cost: float,
    units: list[IntArray],
    slopes: list[FloatArray],
    cost_steps: list[FloatArray],
) -> ConvexHull:
    """Returns the hull with all steps in one order; the stable sort keeps each unit's own order."""
    unit = np.concatenate([*units, np.zeros(0, dtype=np.int64)])
    slope = np.concatenate([*slopes, np.zeros(0)])
    cost_step = np.concatenate([*cost_steps, np.zeros(0)])
    order = np.argsort(slope, kind="stable")
    return ConvexHull(
        loss=loss,
        cost=cost,
        vertices=np.stack(columns, axis=1),
        least_cost=least_cost,
        unit=unit[order],
        slope=slope[order],
        cumulative_cost=least_cost + np.cumsum(cost_step[order]),
        cost_quantum=find_cost_quantum(cost, loss),
    )
