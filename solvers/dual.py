"""Lagrangian dual of several budgets: the best prices of the resources, and the bound they prove.

    D(p) = sum_u min_f (loss[u, f] + p . cost[:, u, f]) - p . limit,   p >= 0,

is concave and piecewise linear, and no feasible choice has less loss than D(p) at any p. Its maximum equals the
linear relaxation's optimum. It is approached by cutting planes in the R-dimensional space of prices (each
evaluation of D yields a cut; a linear program over the cuts proposes the next prices), stabilised by evaluating
between the best prices and the proposed ones; and reached by the linear relaxation over the units that these
prices leave in doubt, whose prices are evaluated on all units. D is flat at its top: prices that are good enough
for the bound are not good enough to find a choice that uses the limits up.

Complexity: O(R U F) per cut plus a small linear program, some dozen cuts for R <= 5; then one or two linear
programs of some thousand candidates.
Limits: slow for dozens of resources; stopped early it still proves the bound it reports.
Sources: J. Kelley, "The cutting-plane method", J. SIAM 8 (1960); W. Ben-Ameur and J. Neto, "Acceleration of
cutting-plane and column generation algorithms", Networks 49 (2007).
"""

from dataclasses import dataclass

import numpy as np

from solvers.linear_program import minimise_fractions
from solvers.problem import FloatArray, IntArray
from solvers.products import dot, price_candidates

MAX_CUTS = 120
RELATIVE_TOLERANCE = 1e-6
EXACT_TOLERANCE = 1e-11
FIRST_OPEN_UNITS = 1000
MAX_OPEN_UNITS = 8000
PRICE_RANGES = (1e2, 1e6, 1e10)
TOWARDS_PROPOSAL = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class DualPoint:
    """Best prices found and what they prove.

    Args:
        price: nats per unit of resource, at least 0, [R].
        bound: D(price), a lower bound of the objective.
        choice: a minimiser at these prices, [U]; feasible only by luck.
        proves_infeasible: the bound exceeds the loss of every choice, so none keeps the limits.
    """

    price: FloatArray
    bound: float
    choice: IntArray
    proves_infeasible: bool


def evaluate_dual(
    loss: FloatArray, cost: FloatArray, limit: FloatArray, price: FloatArray
) -> tuple[float, FloatArray, IntArray]:
    """Returns D(price), its supergradient [R] (use minus limit), and the minimising choice [U]."""
    rows = np.arange(loss.shape[0])
    reduced = loss + price_candidates(price, cost)
    choice = reduced.argmin(axis=1)
    supergradient = cost[:, rows, choice].sum(axis=1) - limit
    return float(loss[rows, choice].sum() + dot(price, supergradient)), supergradient, choice


def maximise_dual(loss: FloatArray, cost: FloatArray, limit: FloatArray) -> DualPoint:
    """Returns the best prices for masked loss [U, F], cost [R, U, F] and finite limits [R]."""
    n_resources = limit.size
    finite = np.where(np.isfinite(loss), loss, -np.inf)
    most_loss, least_loss = float(finite.max(axis=1).sum()), float(loss.min(axis=1).sum())
    bound, supergradient, choice = evaluate_dual(loss, cost, limit, np.zeros(n_resources))
    best = DualPoint(price=np.zeros(n_resources), bound=bound, choice=choice, proves_infeasible=False)
    if not n_resources or np.all(supergradient <= 0) or most_loss == least_loss:
        return best
    # Prices per whole limit (or excess, for limits near 0), so that all are of the size of a loss.
    scale = np.maximum(np.maximum(np.abs(limit), np.abs(supergradient)), cost.max(axis=(1, 2)))
    scale[scale == 0] = 1.0
    cuts = [(np.zeros(n_resources), bound, supergradient / scale)]
    loss_range = most_loss - least_loss
    if loss.shape[0] <= FIRST_OPEN_UNITS:
        best, exact = _reach(loss, cost, limit, best)
        if exact:
            return best
    for price_range in PRICE_RANGES:
        best, at_edge = _climb(loss, cost, limit, scale, cuts, best, price_range * loss_range, most_loss)
        if best.proves_infeasible or not at_edge:
            break
    return best if best.proves_infeasible else _reach(loss, cost, limit, best)[0]


def _reach(loss: FloatArray, cost: FloatArray, limit: FloatArray, best: DualPoint) -> tuple[DualPoint, bool]:
    """Improves the prices by linear programs over the units in doubt; says whether they are proved best."""
    n_units, size = loss.shape[0], FIRST_OPEN_UNITS
    while True:
        ordered = np.sort(loss + price_candidates(best.price, cost), axis=1)
        doubt = ordered[:, min(1, ordered.shape[1] - 1)] - ordered[:, 0]
        is_open = np.zeros(n_units, dtype=bool)
        is_open[np.argsort(doubt, kind="stable")[:size]] = True
        fixed = np.flatnonzero(~is_open)
        taken = best.choice[fixed]
        left = limit - cost[:, fixed, taken].sum(axis=1)
        optimum = minimise_fractions(loss[is_open], cost[:, is_open], left)
        if optimum is not None:
            bound, _, choice = evaluate_dual(loss, cost, limit, optimum.price)
            if bound > best.bound:
                best = DualPoint(price=optimum.price, bound=bound, choice=choice, proves_infeasible=False)
            above = optimum.objective + float(loss[fixed, taken].sum()) - best.bound
            if above <= EXACT_TOLERANCE * max(abs(best.bound), abs(optimum.objective)):
                return best, True
        if size >= min(n_units, MAX_OPEN_UNITS):
            return best, False
        size *= 2


def _climb(
    loss: FloatArray,
    cost: FloatArray,
    limit: FloatArray,
    scale: FloatArray,
    cuts: list[tuple[FloatArray, float, FloatArray]],
    best: DualPoint,
    most_price: float,
    most_loss: float,
) -> tuple[DualPoint, bool]:
    """Maximises the dual over the box [0, most_price]; says whether the maximum is at its edge."""
    proposed = best.price * scale
    while len(cuts) < MAX_CUTS:
        proposed, promised = _propose(cuts, most_price)
        allowance = RELATIVE_TOLERANCE * max(abs(best.bound), abs(promised) * 1e-3, 1e-300)
        if promised - best.bound <= allowance:
            break
        centre = best.price * scale
        for point in (centre + TOWARDS_PROPOSAL * (proposed - centre), proposed):
            bound, supergradient, choice = evaluate_dual(loss, cost, limit, point / scale)
            cuts.append((point, bound, supergradient / scale))
            if bound > best.bound:
                impossible = bound > most_loss + 1e-9 * max(abs(most_loss), abs(bound), 1e-300)
                best = DualPoint(price=point / scale, bound=bound, choice=choice, proves_infeasible=impossible)
                if impossible:
                    return best, True
                break
    return best, bool(np.any(proposed >= 0.999 * most_price))


def _propose(cuts: list[tuple[FloatArray, float, FloatArray]], most_price: float) -> tuple[FloatArray, float]:
    """Returns the prices [R] at which the cuts' upper model of the dual is greatest, and its value there."""
    from scipy.optimize import linprog

    points = np.stack([cut[0] for cut in cuts])
    values = np.array([cut[1] for cut in cuts])
    slopes = np.stack([cut[2] for cut in cuts])
    # theta <= value + slope . (p - point), scaled so that the largest coefficient of a row is 1.
    weight = 1.0 / np.maximum(1.0, np.abs(slopes).max(axis=1))
    matrix = np.hstack([weight[:, None], -slopes * weight[:, None]])
    right = (values - np.sum(slopes * points, axis=1)) * weight
    # HiGHS' tolerances are absolute: measure in units of the values near the top, not of the worst cut.
    size = max(float(np.median(np.abs(values - values.max()))), 1e-6 * float(np.abs(values).max()), 1e-300)
    found = linprog(
        np.concatenate([[-1.0], np.zeros(points.shape[1])]),
        A_ub=matrix,
        b_ub=right / size,
        bounds=[(None, None), *([(0.0, most_price / size)] * points.shape[1])],
        method="highs",
    )
    if found.x is None:
        return points[int(values.argmax())], float(values.max())
    return np.asarray(found.x[1:]) * size, float(found.x[0]) * size
