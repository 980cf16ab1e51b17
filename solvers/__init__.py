"""Choose one storage format per unit: least summed loss under budgets, with proof.

    problem = AllocationProblem(loss=..., cost=..., limit=..., allowed=..., resources=("bytes",))
    result = solve(problem)            # result.choice [U], result.relative_gap, result.shadow_price
    results = solve_frontier(problem, n_points=100)
    result = solve_least_cost(problem, resource="bytes", max_loss=0.05)

Arrays in, arrays out: numpy and scipy; CBC through PuLP only when asked for.
"""

from solvers.check import (
    check_result,
    compute_dual_bound,
    compute_interaction,
    compute_objective,
    compute_use,
    is_feasible,
)
from solvers.dispatch import SOLVERS, choose_solver, solve
from solvers.frontier import solve_frontier
from solvers.least_cost import solve_least_cost
from solvers.params import SolveParams, TrustRegion
from solvers.problem import AllocationProblem
from solvers.result import Answer, SolveResult, SolverFailure, Termination

__all__ = [
    "SOLVERS",
    "AllocationProblem",
    "Answer",
    "SolveParams",
    "SolveResult",
    "SolverFailure",
    "Termination",
    "TrustRegion",
    "check_result",
    "choose_solver",
    "compute_dual_bound",
    "compute_interaction",
    "compute_objective",
    "compute_use",
    "is_feasible",
    "solve",
    "solve_frontier",
    "solve_least_cost",
]
