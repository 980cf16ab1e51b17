"""Lagrangian dual of several budgets: the best prices of the resources, and the bound they prove.

    D(p) = sum_u min_f (loss[u, f] + p . cost[:, u, f]) - p . limit,   p >= 0,

is concave and piecewise linear, and no feasible choice has less loss than D(p) at any p. Its maximum is the optimum of
the linear relaxation, which mixes whole choices with weights: a linear program of R + 1 rows (the limits, and the sum
of the weights), whose columns are the choices that evaluations of D meet. The simplex method on this small program
proposes prices, D there proves a bound and yields the next column, until the two agree. D is flat at its top: prices
that are good enough for the bound are not good enough to find a choice that uses the limits up, so they are made exact.

Complexity: O(R U F) per evaluation, some dozen evaluations for R <= 5, from the prices of a sample where U is large.
Limits: slow for dozens of resources; stopped early it still proves the bound it reports.
Source: G. Dantzig and P. Wolfe, "Decomposition principle for linear programs", Operations Research 8 (1960).
"""

import itertools
from dataclasses import dataclass

import numpy as np

from solvers.problem import FloatArray, IntArray
from solvers.products import dot, price_candidates

EXACT_TOLERANCE = 1e-12
MAX_PIVOTS = 1000
LEAST_PIVOT = 1e-11
SAMPLE_UNITS = 1500
SHORTFALL_PRICES = (1e3, 1e7, 1e11)
"""Loss of exceeding a limit by its whole, in ranges of the loss; the next one is tried where the last did not do."""
COLD_SIZES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
NEAR_SIZES = (0.03, 0.3)
MOST_IN_PAIRS = 5
"""With more resources prices are moved one at a time: the pairs would be too many."""
LEAST_SHARE = 0.2
"""A price of 0 is moved as if it were this share of the greatest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DualPoint:
    """Best prices found and what they prove.

    Args:
        price: nats per unit of resource, at least 0, [R].
        bound: D(price), a lower bound of the objective.
        choice: a minimiser at these prices, [U]; feasible only by luck.
        mixture: the choices whose mixture is the relaxation's optimum, [K, U], K <= R + 1.
        proves_infeasible: the bound exceeds the loss of every choice, so none keeps the limits.
    """

    price: FloatArray
    bound: float
    choice: IntArray
    mixture: IntArray
    proves_infeasible: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scaled:
    """Tables of the size of 1: loss [U, F] and cost [R, U, F] above the least of every unit, what the least leaves of
    the limits [R], and the factors that were taken out."""

    loss: FloatArray
    cost: FloatArray
    limit: FloatArray
    loss_scale: float
    cost_scale: FloatArray


@dataclass(eq=False)
class _Master:
    """The small linear program: objective [N] and matrix [R + 1, N] of the columns, the basic ones, and the choices
    behind the columns from R + 1 on; before them are the slacks of the limits and one that fills every shortfall."""

    objective: FloatArray
    matrix: FloatArray
    basis: list[int]
    choices: list[IntArray]


def evaluate_dual(
    loss: FloatArray, cost: FloatArray, limit: FloatArray, price: FloatArray
) -> tuple[float, FloatArray, IntArray]:
    """Returns D(price), its supergradient [R] (use minus limit), and the minimising choice [U]."""
    rows = np.arange(loss.shape[0])
    choice = (loss + price_candidates(price, cost)).argmin(axis=1)
    supergradient = cost[:, rows, choice].sum(axis=1) - limit
    return float(loss[rows, choice].sum() + dot(price, supergradient)), supergradient, choice


def maximise_dual(
    loss: FloatArray, cost: FloatArray, limit: FloatArray, *, near: FloatArray | None = None
) -> DualPoint:
    """Returns the best prices for masked loss [U, F], cost [R, U, F] and finite limits [R].

    Args:
        near: prices to start from, [R]; from everywhere when None.
    """
    bound, supergradient, choice = evaluate_dual(loss, cost, limit, np.zeros(limit.size))
    free = DualPoint(
        price=np.zeros(limit.size), bound=bound, choice=choice, mixture=choice[None], proves_infeasible=False
    )
    finite = np.where(np.isfinite(loss), loss, -np.inf)
    most_loss = float(finite.max(axis=1).sum())
    if not limit.size or np.all(supergradient <= 0) or most_loss == float(loss.min(axis=1).sum()):
        return free
    scaled = _scale(loss, cost, limit)
    factor = scaled.loss_scale / scaled.cost_scale
    start = None if near is None else near / factor
    price, choices = _climb(scaled, _list_starts(scaled, start))
    bound, _, choice = evaluate_dual(loss, cost, limit, price * factor)
    if bound < free.bound:
        return free
    return DualPoint(
        price=price * factor,
        bound=bound,
        choice=choice,
        mixture=np.stack(choices) if choices else choice[None],
        proves_infeasible=bound > most_loss + 1e-9 * max(abs(most_loss), abs(bound), 1e-300),
    )


def surround(price: FloatArray, sizes: tuple[float, ...]) -> FloatArray:
    """Returns a price [R], and prices around it at distances relative to it, [K, R]."""
    scale = np.maximum(price, LEAST_SHARE * price.max(initial=0.0))
    axes = np.eye(price.size)
    steps = [*axes, *-axes]
    if price.size <= MOST_IN_PAIRS:
        pairs = itertools.combinations(axes, 2)
        steps += [sign * first + other * second for first, second in pairs for sign in (-1, 1) for other in (-1, 1)]
    around = [price + size * scale * np.array(steps) for size in sizes]
    return np.unique(np.maximum(np.concatenate([price[None], *around]), 0.0), axis=0)


def _scale(loss: FloatArray, cost: FloatArray, limit: FloatArray) -> _Scaled:
    valid = np.isfinite(loss)
    loss = loss - loss.min(axis=1, keepdims=True)
    loss_scale = float(np.where(valid, loss, 0.0).max(axis=1).sum())
    least = np.where(valid, cost, np.inf).min(axis=2, keepdims=True)
    cost = np.where(valid, cost - least, 0.0)
    left = limit - least.sum(axis=(1, 2))
    cost_scale = np.maximum(np.abs(left), cost.max(axis=(1, 2)))
    cost_scale[cost_scale == 0] = 1.0
    return _Scaled(
        loss=loss / loss_scale,
        cost=cost / cost_scale[:, None, None],
        limit=left / cost_scale,
        loss_scale=loss_scale,
        cost_scale=cost_scale,
    )


def _list_starts(scaled: _Scaled, near: FloatArray | None) -> FloatArray:
    """Returns the prices to begin with, [K, R]: around given ones or a sample's, or all over the range."""
    n_units, n_resources = scaled.loss.shape[0], scaled.limit.size
    if near is not None:
        return surround(near, NEAR_SIZES)
    if n_units >= 2 * SAMPLE_UNITS:
        stride = n_units // SAMPLE_UNITS
        sample = _Scaled(
            loss=np.ascontiguousarray(scaled.loss[::stride]),
            cost=np.ascontiguousarray(scaled.cost[:, ::stride]),
            limit=scaled.limit * (len(range(0, n_units, stride)) / n_units),
            loss_scale=1.0,
            cost_scale=np.ones(n_resources),
        )
        price, _ = _climb(sample, _list_starts(sample, None))
        nudge = 0.01 * np.eye(n_resources)
        return np.concatenate([price[None], price * (1 + nudge), price * (1 - nudge)])
    directions = np.concatenate([np.eye(n_resources), np.full((1, n_resources), 1 / n_resources)])
    return np.unique(np.concatenate([size * directions for size in COLD_SIZES]), axis=0)


def _climb(scaled: _Scaled, starts: FloatArray) -> tuple[FloatArray, list[IntArray]]:
    """Returns the best prices, [R], and the choices of the relaxation's optimum."""
    best_bound, best_price = -np.inf, starts[0]
    master = _start_master(scaled.limit.size)
    for price in starts:
        bound, supergradient, choice = evaluate_dual(scaled.loss, scaled.cost, scaled.limit, price)
        _add_column(master, bound - dot(price, supergradient), supergradient, choice)
        if bound > best_bound:
            best_bound, best_price = bound, price
    for shortfall_price in SHORTFALL_PRICES:
        master.objective[scaled.limit.size] = shortfall_price
        for _ in range(MAX_PIVOTS):
            price, value, entering = _propose(master)
            allowance = EXACT_TOLERANCE * max(abs(value), abs(best_bound)) + 1e-17
            if entering < 0:
                bound, supergradient, choice = evaluate_dual(scaled.loss, scaled.cost, scaled.limit, price)
                if bound > best_bound:
                    best_bound, best_price = bound, price
                if value - best_bound <= allowance:
                    break
                entering = _add_column(master, bound - dot(price, supergradient), supergradient, choice)
            if not _pivot(master, entering):
                break
        # Losses range over 1, so a bound above it proves that no choice keeps the limits.
        if scaled.limit.size not in master.basis or best_bound > 1.0 + 1e-9:
            break
    return best_price, _list_mixed(master)


def _start_master(n_resources: int) -> _Master:
    # The column after the slacks fills every shortfall: a choice that uses less than it has, at a price.
    matrix = np.eye(n_resources + 1)
    matrix[:-1, -1] = -1.0
    return _Master(objective=np.zeros(n_resources + 1), matrix=matrix, basis=list(range(n_resources + 1)), choices=[])


def _add_column(master: _Master, loss: float, excess: FloatArray, choice: IntArray) -> int:
    master.matrix = np.concatenate([master.matrix, np.append(excess, 1.0)[:, None]], axis=1)
    master.objective = np.append(master.objective, loss)
    master.choices.append(choice)
    return master.objective.size - 1


def _propose(master: _Master) -> tuple[FloatArray, float, int]:
    """Returns the basis' prices [R], its objective, and the column to enter, -1 when none does."""
    dual = np.linalg.solve(master.matrix[:, master.basis].T, master.objective[master.basis])
    reduced = master.objective - (dual[:, None] * master.matrix).sum(axis=0)
    reduced[master.basis] = 0.0
    entering = int(reduced.argmin())
    magnitude = float(np.abs(dual * master.matrix[:, entering]).sum() + abs(master.objective[entering]))
    enters = reduced[entering] < -1e-14 * max(magnitude, abs(float(dual[-1])))
    return np.maximum(-dual[:-1], 0.0), float(dual[-1]), entering if enters else -1


def _pivot(master: _Master, entering: int) -> bool:
    """Takes a column into the basis; returns whether one could leave."""
    basic = master.matrix[:, master.basis]
    right = np.append(np.zeros(len(master.basis) - 1), 1.0)
    solved = np.linalg.solve(basic, np.stack([master.matrix[:, entering], right], axis=1))
    step, weight = solved[:, 0], np.maximum(solved[:, 1], 0.0)
    ratio = np.full(weight.size, np.inf)
    np.divide(weight, step, out=ratio, where=step > LEAST_PIVOT)
    leaving = int(ratio.argmin())
    if not np.isfinite(ratio[leaving]):
        return False
    master.basis[leaving] = entering
    return True


def _list_mixed(master: _Master) -> list[IntArray]:
    first = master.matrix.shape[0]
    return [master.choices[column - first] for column in sorted(master.basis) if column >= first]
