"""Per-block budgets: every block of units gets its part of the limits and is planned by itself.

MC-MoE plans the experts of one layer at a time, with the same mean bits in every layer and the loss

    loss[u, f] = frequency[u]^alpha * routing_weight[u]^beta * error[u, f]^gamma.

A block's part of a limit is its part of the weights. One common budget is never worse; the difference is what this
baseline shows.

Complexity: one solve per block. Limits: no exchange between blocks; a block whose part is below its least use has no
plan, even where the whole has one.
Source: W. Huang et al., "MC-MoE", arXiv 2410.06270 (alpha 1, beta 1.5, gamma 2; its code raises the error to alpha).
"""

from dataclasses import replace

import numpy as np

from solvers.certification import run_certified
from solvers.dispatch import solve
from solvers.dual_bound import answer_with_dual_bound, find_dual_bound
from solvers.knapsack import check_separable
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, FloatArray, IntArray
from solvers.result import Answer, SolveResult


def weigh_expert_errors(
    error: FloatArray,
    *,
    frequency: FloatArray,
    routing_weight: FloatArray,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 2.0,
) -> FloatArray:
    """Returns MC-MoE's loss of every candidate of one block, [U, F]; its unit is not nats.

    Args:
        error: output error of the block with one expert in one format, [U, F].
        frequency: how often every expert is chosen, normalised to sum 1 here, [U].
        routing_weight: summed routing weight of every expert, normalised to sum 1 here, [U].
        alpha: exponent of the frequency.
        beta: exponent of the routing weight.
        gamma: exponent of the error.
    """
    importance = (frequency / frequency.sum()) ** alpha * (routing_weight / routing_weight.sum()) ** beta
    return np.asarray(importance[:, None] * error**gamma)


def solve_block_budgets(
    problem: AllocationProblem, params: SolveParams, *, block: IntArray, n_weights: FloatArray
) -> SolveResult:
    """Returns the plan made block by block, with the Lagrangian bound of the whole problem.

    Args:
        block: block of every unit, any integers, [U].
        n_weights: weights of every unit, above 0, [U].

    Raises:
        ValueError: interactions, or weights that are not above 0.
    """
    check_separable(problem, "block_budgets")
    if np.any(n_weights <= 0):
        msg = f"n_weights must be above 0: got least weight {n_weights.min()}."
        raise ValueError(msg)

    def search(problem: AllocationProblem, params: SolveParams) -> Answer:
        choice, n_blocks = _solve_blocks(problem, params, block, n_weights)
        detail = f"{n_blocks} blocks, each with its part of the limits"
        return answer_with_dual_bound(problem, choice, find_dual_bound(problem), detail=detail)

    return run_certified(problem, params, solver="block_budgets", search=search)


def _solve_blocks(
    problem: AllocationProblem, params: SolveParams, block: IntArray, n_weights: FloatArray
) -> tuple[IntArray | None, int]:
    choice = np.zeros(problem.n_units, dtype=np.int64)
    plain = replace(params, starts=(), trust_region=None, validation_sketch=None)
    names = np.unique(block)
    for name in names:
        units = block == name
        part = AllocationProblem(
            loss=problem.loss[units],
            cost=problem.cost[:, units],
            limit=problem.limit * float(n_weights[units].sum() / n_weights.sum()),
            allowed=problem.allowed[units],
            resources=problem.resources,
        )
        found = solve(part, params=plain).choice
        if found is None:
            return None, names.size
        choice[units] = found
    return choice, names.size
