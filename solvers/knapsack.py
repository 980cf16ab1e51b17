"""One budget, exactly: multiple-choice knapsack with a certificate.

    minimise  sum_u loss[u, c_u]   subject to  sum_u cost[u, c_u] <= limit

1. Relax: lower convex hull of every unit, steps sorted by slope (`convex_hull`). Gives a lower bound, a
   shadow price and a feasible choice that misses at most one step.
2. Improve: the best single change, and the best change beside the step that broke the budget.
3. Prove: changes whose reduced cost reaches the gap cannot pay; an exact search over the rest
   (`knapsack_core`) closes the gap or narrows it to the tolerance.

Complexity: O(U F^2 + N log N) for steps 1 and 2, N <= U (F - 1); step 3 is pseudo-polynomial, small in
practice.
Limits: one limit that can bind, no interactions.
"""

import numpy as np

from solvers.certification import run_certified
from solvers.convex_hull import ConvexHull, Relaxation, relax
from solvers.knapsack_core import CoreOutcome, build_core, search_core
from solvers.near_hull import build_hull_near
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, FloatArray, IntArray
from solvers.result import Answer, SolveResult


def solve_knapsack(problem: AllocationProblem, params: SolveParams) -> SolveResult:
    """Returns the optimum of a separable problem in which at most one limit can bind.

    Raises:
        ValueError: the problem has interactions, or several limits that can bind.
    """
    return run_certified(problem, params, solver="knapsack", search=search_knapsack)


def search_knapsack(problem: AllocationProblem, params: SolveParams) -> Answer:
    """Returns the answer of the knapsack solver; limits below the least use must have been ruled out."""
    check_one_budget(problem, "knapsack")
    resource = problem.binding[0] if problem.binding else 0
    limit = float(problem.target[resource])
    hull = build_hull_near(problem.masked_loss, problem.masked_cost[resource], limit)
    choice, lower_bound, price, outcome = search_hull(hull, limit, params)
    shadow_price = np.zeros(len(problem.resources))
    shadow_price[resource] = price
    return Answer(
        choice=choice,
        lower_bound=lower_bound,
        shadow_price=shadow_price,
        limit_hit=outcome.limit_hit,
        detail=f"convex hull, then an exact search over {outcome.n_states} states",
    )


def search_hull(hull: ConvexHull, limit: float, params: SolveParams) -> tuple[IntArray, float, float, CoreOutcome]:
    """Returns choice [U], lower bound, shadow price and how the exact search ended, for one limit."""
    deadline = params.find_deadline()
    relaxed = relax(hull, limit)
    choice = relaxed.choice.copy()
    rounded_loss = float(np.sum(hull.loss[np.arange(choice.size), choice]))
    improvement, changes = find_best_changes(hull, relaxed)
    gap = improvement + relaxed.price * relaxed.slack
    tolerance = params.relative_gap_tolerance * abs(rounded_loss + improvement)
    if gap <= tolerance:
        outcome = CoreOutcome(
            loss_step=improvement,
            lower_bound=-relaxed.price * relaxed.slack,
            changes=None,
            limit_hit=None,
            n_states=0,
        )
    else:
        outcome = search_core(
            build_core(hull, relaxed, gap),
            incumbent=improvement,
            tolerance=tolerance,
            node_limit=params.node_limit,
            deadline=deadline,
        )
    for unit, chosen in changes if outcome.changes is None else outcome.changes:
        choice[unit] = chosen
    return choice, rounded_loss + outcome.lower_bound, relaxed.price, outcome


def find_best_changes(hull: ConvexHull, relaxed: Relaxation) -> tuple[float, list[tuple[int, int]]]:
    """Returns the best change of loss, at most 0, by one change or by one beside the breaking step."""
    if relaxed.break_unit < 0:
        return 0.0, []
    rows = np.arange(hull.loss.shape[0])
    cost_step = hull.cost - hull.cost[rows, relaxed.choice][:, None]
    loss_step = hull.loss - hull.loss[rows, relaxed.choice][:, None]
    unit, chosen = _find_least(np.where(cost_step <= relaxed.slack, loss_step, np.inf))
    best = float(loss_step[unit, chosen])
    changes = [(unit, chosen)]
    broken = (relaxed.break_unit, relaxed.break_format)
    beside = np.where(cost_step <= relaxed.slack - cost_step[broken], loss_step, np.inf)
    beside[relaxed.break_unit] = np.inf
    unit, chosen = _find_least(beside)
    with_break = float(beside[unit, chosen] + loss_step[broken])
    if with_break < best:
        best, changes = with_break, [broken, (unit, chosen)]
    return (best, changes) if best < 0 else (0.0, [])


def check_one_budget(problem: AllocationProblem, solver: str) -> None:
    """Raises ValueError unless the problem is separable and at most one of its limits can bind."""
    check_separable(problem, solver)
    if len(problem.binding) > 1:
        names = ", ".join(problem.resources[r] for r in problem.binding)
        msg = f"{solver} must be given at most one limit that can bind: got {names}. Use multi_knapsack."
        raise ValueError(msg)


def check_separable(problem: AllocationProblem, solver: str) -> None:
    """Raises ValueError when the problem has interactions."""
    if not problem.is_separable:
        msg = (
            f"{solver} must be given a problem without interactions: got a sketch and "
            f"interaction_scale={problem.interaction_scale}. Use quadratic, or drop the sketch."
        )
        raise ValueError(msg)


def _find_least(table: FloatArray) -> tuple[int, int]:
    unit, chosen = divmod(int(table.argmin()), table.shape[1])
    return unit, chosen
