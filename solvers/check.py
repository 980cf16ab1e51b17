"""Recompute everything a result claims, from the choice alone.

Sums over units are exactly rounded (math.fsum): they do not depend on order, on threads, or on a backend.
"""

import math

import numpy as np

from solvers.problem import AllocationProblem, FloatArray, IntArray
from solvers.products import contract, dot, price_candidates
from solvers.result import SolveResult, Termination

ROUNDING = 1e-12
"""Relative rounding allowance of an objective, against the sum of the magnitudes that it is summed from."""


def compute_objective(problem: AllocationProblem, choice: IntArray) -> float:
    """Returns the objective of a choice [U], nats per token, interactions included."""
    units = np.arange(problem.n_units)
    own_loss = math.fsum(problem.loss[units, choice].tolist())
    if problem.is_separable:
        return own_loss
    return own_loss + problem.interaction_scale * compute_interaction(problem, choice)


def compute_interaction(problem: AllocationProblem, choice: IntArray) -> float:
    """Returns sum_{u<v} <sketch[:, u, c_u], sketch[:, v, c_v]> of a choice [U], before interaction_scale."""
    if problem.sketch is None:
        return 0.0
    chosen = problem.sketch[:, np.arange(problem.n_units), choice].astype(np.float64)
    total = chosen.sum(axis=1)
    return float(0.5 * (dot(total, total) - np.sum(chosen * chosen)))


def compute_use(problem: AllocationProblem, choice: IntArray) -> FloatArray:
    """Returns the use of every resource, [R], of a choice [U]."""
    chosen = problem.cost[:, np.arange(problem.n_units), choice]
    return np.array([math.fsum(row.tolist()) for row in chosen])


def is_feasible(problem: AllocationProblem, choice: IntArray) -> bool:
    """Returns whether a choice [U] is allowed everywhere and keeps every limit."""
    return keeps_limits(problem, choice, compute_use(problem, choice))


def keeps_limits(problem: AllocationProblem, choice: IntArray, use: FloatArray) -> bool:
    """Returns whether a choice [U] is allowed everywhere and its use [R] keeps every limit."""
    allowed = problem.allowed[np.arange(problem.n_units), choice].all()
    return bool(allowed and np.all(use <= problem.ceiling))


def compute_dual_bound(problem: AllocationProblem, price: FloatArray, *, sketch_sum: FloatArray | None = None) -> float:
    """Returns the Lagrangian lower bound of a problem at the given prices.

    sum_u min_f (loss[u, f] + price . cost[:, u, f]) - price . limit, valid for every price >= 0: anyone can
    check a shadow price with it. With interactions the objective is linearised at a vector W first (`relaxation`),
    which is a bound for every W: loss[u, f] then stands for loss[u, f] + rho (<W, sketch[:, u, f]> -
    1/2 ||sketch[:, u, f]||^2), and rho/2 ||W||^2 is taken off.

    Args:
        price: nats per unit of each resource, at least 0, [R]; must be 0 where the limit is infinite.
        sketch_sum: W, [S]; needed with interactions, where a result of the quadratic solver holds it.

    Raises:
        ValueError: a problem with interactions, and no sketch_sum.
    """
    loss, taken_off = problem.masked_loss, 0.0
    if not problem.is_separable and problem.sketch is not None:
        if sketch_sum is None:
            msg = "sketch_sum must be given for a problem with interactions: got None. Pass the result's."
            raise ValueError(msg)
        sketch = np.where(problem.allowed, problem.sketch, 0.0).astype(np.float64)
        along = contract("s,suf->uf", sketch_sum, sketch) - 0.5 * contract("suf,suf->uf", sketch, sketch)
        loss = loss + problem.interaction_scale * along
        taken_off = 0.5 * problem.interaction_scale * dot(sketch_sum, sketch_sum)
    priced = np.flatnonzero(price > 0)
    reduced = loss + price_candidates(price[priced], problem.masked_cost[priced])
    return math.fsum(reduced.min(axis=1).tolist()) - dot(price[priced], problem.ceiling[priced]) - taken_off


def rounding_allowance(problem: AllocationProblem, choice: IntArray) -> float:
    """Returns how far apart two correct computations of the objective of a choice [U] may be."""
    magnitude = float(np.abs(problem.loss[np.arange(problem.n_units), choice]).sum())
    if not problem.is_separable and problem.sketch is not None:
        chosen = problem.sketch[:, np.arange(problem.n_units), choice].astype(np.float64)
        magnitude += problem.interaction_scale * float(np.sum(np.abs(chosen).sum(axis=1) ** 2))
    return ROUNDING * magnitude


def check_result(problem: AllocationProblem, result: SolveResult, *, relative_gap_tolerance: float = 1e-9) -> list[str]:
    """Returns every way in which a result contradicts its problem; an empty list when it holds.

    Args:
        relative_gap_tolerance: the tolerance that the solve was asked for.
    """
    if result.choice is None:
        return _check_without_choice(problem, result)
    choice = result.choice
    in_range = choice.shape == (problem.n_units,) and np.all((choice >= 0) & (choice < problem.n_formats))
    if not in_range:
        return [f"choice must hold {problem.n_units} format indices: got shape {choice.shape}"]
    violations = _check_limits(problem, result, choice)
    violations += _check_objective(problem, result, choice)
    allowance = rounding_allowance(problem, choice)
    # Written so that NaN is a violation too.
    if not result.lower_bound <= result.objective + allowance:
        violations.append(f"lower_bound {result.lower_bound} is above the objective {result.objective}")
    if result.termination not in (Termination.OPTIMAL, Termination.FEASIBLE):
        violations.append(f"termination is {result.termination.name} although there is a choice")
    within = result.gap <= relative_gap_tolerance * abs(result.objective) + allowance
    if result.termination is Termination.OPTIMAL and not within:
        violations.append(f"termination is OPTIMAL at a gap of {result.gap}")
    return violations


def _check_limits(problem: AllocationProblem, result: SolveResult, choice: IntArray) -> list[str]:
    violations = []
    forbidden = np.flatnonzero(~problem.allowed[np.arange(problem.n_units), choice])
    if forbidden.size:
        unit = int(forbidden[0])
        violations.append(f"{forbidden.size} units have a format that is not allowed, first unit={unit}")
    use = compute_use(problem, choice)
    for r, name in enumerate(problem.resources):
        if use[r] > problem.ceiling[r]:
            violations.append(f"use of {name} is {use[r]}, above its limit {problem.limit[r]}")
        if use[r] != result.use[r]:
            violations.append(f"reported use of {name} is {result.use[r]}, recomputed {use[r]}")
    return violations


def _check_objective(problem: AllocationProblem, result: SolveResult, choice: IntArray) -> list[str]:
    objective = compute_objective(problem, choice)
    if abs(objective - result.objective) > rounding_allowance(problem, choice):
        return [f"reported objective is {result.objective}, recomputed {objective}"]
    return []


def _check_without_choice(problem: AllocationProblem, result: SolveResult) -> list[str]:
    violations = []
    if result.termination in (Termination.OPTIMAL, Termination.FEASIBLE):
        violations.append(f"termination is {result.termination.name} without a choice")
    if result.objective != math.inf:
        violations.append(f"objective is {result.objective} without a choice")
    if result.termination is Termination.INFEASIBLE and result.resource_at_fault is None:
        violations.append("termination is INFEASIBLE without a resource at fault")
    if not np.allclose(result.least_use, problem.least_use, rtol=1e-9):
        violations.append(f"least_use is {result.least_use}, recomputed {problem.least_use}")
    return violations
