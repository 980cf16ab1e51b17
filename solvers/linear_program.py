"""The linear relaxation of several budgets over given candidates, by HiGHS (scipy.optimize.linprog).

    minimise  sum loss[u, f] x[u, f]   subject to  sum_f x[u, f] = 1,  sum cost[r, u, f] x[u, f] <= limit[r],  x >= 0

Losses and limits are scaled first, as HiGHS' tolerances are absolute. Its values are used as proposals only: bounds
are recomputed from the prices (`dual`).

Complexity: thousands of candidates in tenths of a second.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from solvers.problem import FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearOptimum:
    """Fractions of every candidate, [U, F], prices of the limits, [R], and the objective."""

    fractions: FloatArray
    price: FloatArray
    objective: float


def minimise_fractions(loss: FloatArray, cost: FloatArray, limit: FloatArray) -> LinearOptimum | None:
    """Returns the optimum for masked loss [U, F], cost [R, U, F] and limits [R]; None if there is none."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    unit, formats = np.nonzero(np.isfinite(loss))
    least = loss.min(axis=1)
    objective = loss[unit, formats] - least[unit]
    size = max(float(objective.max(initial=0.0)), 1e-300)
    rows = cost[:, unit, formats]
    row_scale = 1.0 / np.maximum(np.maximum(np.abs(limit), rows.max(axis=1, initial=0.0)), 1e-300)
    program: dict[str, Any] = {
        "c": objective / size,
        "A_ub": rows * row_scale[:, None],
        "b_ub": limit * row_scale,
        "A_eq": csr_array((np.ones(unit.size), (unit, np.arange(unit.size)))),
        "b_eq": np.ones(loss.shape[0]),
        "bounds": (0, None),
        "method": "highs-ds",
    }
    found: Any = linprog(**program)
    if found.x is None:
        return None
    fractions = np.zeros(loss.shape)
    fractions[unit, formats] = found.x
    price = np.maximum(-np.asarray(found.ineqlin.marginals), 0.0) * size * row_scale
    return LinearOptimum(fractions=fractions, price=price, objective=float(found.fun) * size + float(least.sum()))
