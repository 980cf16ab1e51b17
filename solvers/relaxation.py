"""Lower bound of the quadratic objective, by its convex relaxation.

With V = sum_u sketch[:, u, c_u] and rho = interaction_scale, the objective is

    sum_u a[u, c_u] + rho/2 ||V||^2,    a[u, f] = loss[u, f] - rho/2 ||sketch[:, u, f]||^2,

linear in the one-hot variables but for the convex ||V||^2. For every vector W,

    min over feasible c of  sum_u (a[u, c_u] + rho <W, sketch[:, u, c_u]>)  -  rho/2 ||W||^2

is a lower bound (1/2||V||^2 >= <W, V> - 1/2||W||^2), and so is any lower bound of that linear problem. It
is best at the relaxation's own V, which is found by Frank-Wolfe with pairwise steps over the points met so
far; every iteration proves a bound, so the certificate holds wherever the iteration stops.

Complexity: O(S U F) per iteration. Limits: a mixture of two formats has less error than either, so the
bound is weak where the interactions are large against the own losses; it is a bound all the same.
Source: S. Lacoste-Julien and M. Jaggi, "On the global linear convergence of Frank-Wolfe optimization
variants", NeurIPS 2015.
"""

import time
from dataclasses import dataclass

import numpy as np

from solvers.convex_hull import build_hull, relax
from solvers.dual import evaluate_dual
from solvers.linear_program import minimise_fractions
from solvers.problem import FloatArray
from solvers.products import contract, dot

MAX_ITERATIONS = 400
PAIRWISE_STEPS = 60
RELATIVE_TOLERANCE = 1e-5
WEIGHT_FLOOR = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class QuadraticBound:
    """What the relaxation proves.

    Args:
        bound: lower bound of the objective.
        sketch_sum: the W it was proved at, [S].
        price: prices of the limits there, [R].
    """

    bound: float
    sketch_sum: FloatArray
    price: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearMinimum:
    """Minimiser of a linear function over the relaxation: fractions [U, F], a lower bound, and prices [R]."""

    fractions: FloatArray
    bound: float
    price: FloatArray


@dataclass(eq=False)
class _Points:
    """Points met so far: linear parts [K], sketch sums [K, S], their inner products [K, K] and weights
    [K]."""

    linear: FloatArray
    vectors: FloatArray
    gram: FloatArray
    weight: FloatArray


def bound_quadratic(
    own: FloatArray,
    sketch: FloatArray,
    scale: float,
    cost: FloatArray,
    limit: FloatArray,
    *,
    deadline: float,
) -> QuadraticBound:
    """Returns a lower bound of the quadratic objective over the choices that keep the limits.

    Args:
        own: the linear part a, inf where not allowed, [U, F].
        sketch: 0 where not allowed, [U, F, S].
        scale: interaction scale rho, at least 0.
        cost: cost of the limited resources, [R, U, F].
        limit: finite, [R].
        deadline: time.perf_counter() value after which to stop.
    """
    flat = sketch.reshape(-1, sketch.shape[2])
    finite_own = np.where(np.isfinite(own), own, 0.0)
    best = QuadraticBound(bound=-np.inf, sketch_sum=np.zeros(flat.shape[1]), price=np.zeros(limit.size))
    sketch_sum = best.sketch_sum
    points = _Points(np.zeros(0), np.zeros((0, flat.shape[1])), np.zeros((0, 0)), np.zeros(0))
    for _ in range(MAX_ITERATIONS):
        linear = own + scale * contract("is,s->i", flat, sketch_sum).reshape(own.shape)
        least = minimise_linear(linear, cost, limit)
        bound = least.bound - 0.5 * scale * dot(sketch_sum, sketch_sum)
        if bound > best.bound:
            best = QuadraticBound(bound=bound, sketch_sum=sketch_sum, price=least.price)
        _add_point(
            points, float(np.sum(finite_own * least.fractions)), contract("i,is->s", least.fractions.ravel(), flat)
        )
        _balance(points, scale)
        sketch_sum = contract("k,ks->s", points.weight, points.vectors)
        objective = dot(points.weight, points.linear) + 0.5 * scale * dot(sketch_sum, sketch_sum)
        converged = objective - best.bound <= RELATIVE_TOLERANCE * abs(objective)
        if converged or time.perf_counter() > deadline:
            break
    return best


def minimise_linear(linear: FloatArray, cost: FloatArray, limit: FloatArray) -> LinearMinimum:
    """Returns the minimiser of a linear function [U, F] (inf where not allowed) over the relaxation."""
    rows = np.arange(linear.shape[0])
    fractions = np.zeros(linear.shape)
    if limit.size > 1:
        return _minimise_by_highs(linear, cost, limit)
    if limit.size == 0:
        choice = linear.argmin(axis=1)
        fractions[rows, choice] = 1.0
        return LinearMinimum(fractions=fractions, bound=float(linear[rows, choice].sum()), price=np.zeros(0))
    relaxed = relax(build_hull(linear, cost[0]), float(limit[0]))
    fractions[rows, relaxed.choice] = 1.0
    if relaxed.break_unit >= 0:
        unit, before = relaxed.break_unit, int(relaxed.choice[relaxed.break_unit])
        step = cost[0, unit, relaxed.break_format] - cost[0, unit, before]
        part = min(relaxed.slack / step, 1.0)
        fractions[unit, before], fractions[unit, relaxed.break_format] = 1.0 - part, part
    bound = float(linear[rows, relaxed.choice].sum()) - relaxed.price * relaxed.slack
    return LinearMinimum(fractions=fractions, bound=bound, price=np.array([relaxed.price]))


def _minimise_by_highs(linear: FloatArray, cost: FloatArray, limit: FloatArray) -> LinearMinimum:
    """Solves the linear program of several limits; the bound is recomputed from its prices, not taken from HiGHS."""
    optimum = minimise_fractions(linear, cost, limit)
    if optimum is None:
        fractions, price = np.zeros(linear.shape), np.zeros(limit.size)
        fractions[np.arange(linear.shape[0]), linear.argmin(axis=1)] = 1.0
    else:
        fractions, price = optimum.fractions, optimum.price
    bound, _, _ = evaluate_dual(linear, cost, limit, price)
    return LinearMinimum(fractions=fractions, bound=bound, price=price)


def _add_point(points: _Points, linear: float, vector: FloatArray) -> None:
    """Adds a point with weight 0 (1 when it is the first), after dropping the points without weight."""
    kept = np.flatnonzero(points.weight > WEIGHT_FLOOR)
    vectors = np.vstack([points.vectors[kept], vector])
    inner = contract("ks,s->k", vectors, vector)
    gram = np.empty((inner.size, inner.size))
    gram[:-1, :-1] = points.gram[np.ix_(kept, kept)]
    gram[-1], gram[:, -1] = inner, inner
    points.linear = np.append(points.linear[kept], linear)
    points.vectors, points.gram = vectors, gram
    weight = np.append(points.weight[kept], 0.0 if kept.size else 1.0)
    points.weight = weight / weight.sum()


def _balance(points: _Points, scale: float) -> None:
    """Shifts weight from the worst point to the best, pair by pair, as far as the objective falls."""
    gradient = points.linear + scale * contract("kl,l->k", points.gram, points.weight)
    for _ in range(PAIRWISE_STEPS):
        best = int(gradient.argmin())
        worst = int(np.where(points.weight > 0, gradient, -np.inf).argmax())
        gain = gradient[worst] - gradient[best]
        if gain <= 0:
            return
        curvature = points.gram[best, best] - 2 * points.gram[best, worst] + points.gram[worst, worst]
        step = points.weight[worst]
        if scale * curvature > 0:
            step = min(step, gain / (scale * curvature))
        points.weight[best] += step
        points.weight[worst] -= step
        gradient += scale * step * (points.gram[:, best] - points.gram[:, worst])
