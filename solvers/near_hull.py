"""The convex hulls that one limit needs: of the units whose format depends on the price near its shadow price.

At a price p a unit takes the format of least loss + p * cost. Two prices, one at which all units together exceed the
limit and one at which they do not, hold the shadow price between them; a unit that takes the same format at both takes
it at every price in between, and its other formats are no part of the relaxation's optimum. Hulls are built and their
steps sorted for the other units alone, a few in a hundred.

Complexity: O(U F) for each of some four prices, the first taken from a sample; the hull's O(V F^2 + N log N) for the V
units left.
Limits: serves limits between the uses at the two prices, so one solve; a frontier needs all hulls.
"""

from dataclasses import replace

import numpy as np

from solvers.convex_hull import ConvexHull, build_hull, find_cost_quantum, relax
from solvers.problem import FloatArray, IntArray

LEAST_UNITS = 3000
"""With fewer units all hulls are built: it is as fast."""
SAMPLE_UNITS = 1000
FIRST_DISTANCE = 0.02
MAX_PRICES = 12
CLEAR_EXCESS = 1e-9
"""Relative to the limit: an excess that sums in another order keep."""


def build_hull_near(loss: FloatArray, cost: FloatArray, limit: float) -> ConvexHull:
    """Returns the hulls of masked loss and cost, both [U, F], as far as the relaxation at one limit needs them."""
    between = _bracket(loss, cost, limit) if loss.shape[0] >= LEAST_UNITS else None
    if between is None:
        return build_hull(loss, cost)
    low, high = between
    rows = np.flatnonzero(low != high)
    fixed = np.flatnonzero(low == high)
    part = build_hull(loss[rows], cost[rows])
    vertices = np.repeat(low[:, None], part.vertices.shape[1], axis=1)
    vertices[rows] = part.vertices
    fixed_cost = float(np.sum(cost[fixed, low[fixed]]))
    return replace(
        part,
        loss=loss,
        cost=cost,
        vertices=vertices,
        least_cost=part.least_cost + fixed_cost,
        unit=rows[part.unit],
        cumulative_cost=part.cumulative_cost + fixed_cost,
        cost_quantum=find_cost_quantum(cost, loss),
    )


def _bracket(loss: FloatArray, cost: FloatArray, limit: float) -> tuple[IntArray, IntArray] | None:
    """Returns the choices [U] at two prices between which the limit is met; None where none are found."""
    rows = np.arange(loss.shape[0])
    stride = loss.shape[0] // SAMPLE_UNITS
    sample = build_hull(np.ascontiguousarray(loss[::stride]), np.ascontiguousarray(cost[::stride]))
    price = relax(sample, max(limit * (len(range(0, rows.size, stride)) / rows.size), sample.least_cost)).price
    if price <= 0.0 or not np.isfinite(limit):
        return None
    within: IntArray | None = None
    beyond: IntArray | None = None
    distance = FIRST_DISTANCE
    for _ in range(MAX_PRICES):
        choice = (loss + price * cost).argmin(axis=1)
        excess = float(cost[rows, choice].sum()) - limit
        if excess <= 0:
            within, price = choice, price / (1.0 + distance)
        elif excess > CLEAR_EXCESS * limit:
            beyond, price = choice, price * (1.0 + distance)
        else:
            return None
        if within is not None and beyond is not None:
            return within, beyond
        distance *= 2.0
    return None
