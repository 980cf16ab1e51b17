"""Lagrangian dual of several budgets: the best prices of the resources, and the bound they prove.

    D(p) = sum_u min_f (loss[u, f] + p . cost[:, u, f]) - p . limit,   p >= 0,

is concave and piecewise linear, and no feasible choice has less loss than D(p) at any p. It is maximised by
cutting planes in the R-dimensional space of prices (each evaluation of D yields a cut; a linear program over the
cuts proposes the next prices), stabilised by evaluating between the best prices and the proposed ones. The maximum
equals the linear relaxation's optimum.

Complexity: O(R U F) per cut plus a small linear program; some dozen cuts for R <= 5.
Limits: slow for dozens of resources; stopped early it still proves the bound it reports.
Sources: J. Kelley, "The cutting-plane method", J. SIAM 8 (1960); W. Ben-Ameur and J. Neto, "Acceleration of
cutting-plane and column generation algorithms", Networks 49 (2007).
"""

from dataclasses import dataclass

import numpy as np

from solvers.problem import FloatArray, IntArray

MAX_CUTS = 400
RELATIVE_TOLERANCE = 1e-10
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
    reduced = loss + np.tensordot(price, cost, axes=1)
    choice = reduced.argmin(axis=1)
    supergradient = cost[:, rows, choice].sum(axis=1) - limit
    return float(loss[rows, choice].sum() + price @ supergradient), supergradient, choice


def maximise_dual(loss: FloatArray, cost: FloatArray, limit: FloatArray) -> DualPoint:
    """Returns the best prices for masked loss [U, F], cost [R, U, F] and finite limits [R]."""
    n_resources = limit.size
    finite = np.where(np.isfinite(loss), loss, -np.inf)
    most_loss, least_loss = float(finite.max(axis=1).sum()), float(loss.min(axis=1).sum())
    bound, supergradient, choice = evaluate_dual(loss, cost, limit, np.zeros(n_resources))
    best = DualPoint(price=np.zeros(n_resources), bound=bound, choice=choice, proves_infeasible=False)
    if not n_resources or np.all(supergradient <= 0) or most_loss == least_loss:
        return best
    # Prices per whole limit, so that all are of the size of a loss.
    scale = np.maximum(np.abs(limit), 1e-12 * np.maximum(np.abs(supergradient), 1e-300))
    cuts = [(np.zeros(n_resources), bound, supergradient / scale)]
    loss_range = most_loss - least_loss
    for price_range in PRICE_RANGES:
        best, at_edge = _climb(loss, cost, limit, scale, cuts, best, price_range * loss_range, most_loss)
        if best.proves_infeasible or not at_edge:
            break
    return best


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
    """Adds cuts until the dual is maximised over the box [0, most_price]; says whether the maximum is at its edge."""
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
    size = max(float(np.abs(values).max()), 1e-300)
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
