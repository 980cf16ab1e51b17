"""Choose one storage format per unit: least summed loss under budgets, with proof.

    problem = AllocationProblem(loss=..., cost=..., limit=..., allowed=..., resources=("bytes",))
    result = solve(problem)            # result.choice [U], result.relative_gap, result.shadow_price
    results = solve_frontier(problem, n_points=100)
    result = solve_least_cost(problem, resource="bytes", max_loss=0.05)
    result = solve_constrained(problem, (CountLimit(name="best", units=mask, format_index=2, at_least=1),))
    result = solve_tied(problem, ties=((4, 6), (9, 11)))
    plans = solve_diverse(problem, n_plans=5, relative_excess=0.01, min_changes=10)

One limit or several are solved exactly by our own search (`knapsack`, `multi_knapsack`). Arrays in, arrays out: numpy
and scipy; CBC and HiGHS through PuLP and Clarabel through CVXPY only when asked for.
Rules that people know are in `solvers.baselines`, those that fit an AllocationProblem in SOLVERS too.
"""

from solvers.check import (
    check_result,
    compute_dual_bound,
    compute_interaction,
    compute_objective,
    compute_use,
    is_feasible,
)
from solvers.constraints import (
    CountLimit,
    GroupBudget,
    MeanWidth,
    add_constraints,
    fix_units,
    solve_constrained,
)
from solvers.convex_program import ConvexOptimum, relax_by_cvxpy
from solvers.dispatch import SOLVERS, choose_solver, solve
from solvers.diverse import DiversePlans, solve_diverse
from solvers.equal_loss import (
    BitAllocation,
    allocate_bits,
    build_bit_problem,
    predict_gain,
    round_to_bits,
    round_to_levels,
)
from solvers.frontier import list_efficient, solve_frontier
from solvers.instances import make_instance
from solvers.least_cost import solve_least_cost
from solvers.pairwise import PairwiseSketch, build_pairwise_matrix, project_pairwise
from solvers.params import SolveParams, TrustRegion
from solvers.problem import AllocationProblem
from solvers.result import Answer, SolveResult, SolverFailure, Termination
from solvers.robust import Regret, measure_regret
from solvers.ties import TiedProblem, expand_choice, merge_choice, merge_ties, solve_tied

__all__ = [
    "SOLVERS",
    "AllocationProblem",
    "Answer",
    "BitAllocation",
    "ConvexOptimum",
    "CountLimit",
    "DiversePlans",
    "GroupBudget",
    "MeanWidth",
    "PairwiseSketch",
    "Regret",
    "SolveParams",
    "SolveResult",
    "SolverFailure",
    "Termination",
    "TiedProblem",
    "TrustRegion",
    "add_constraints",
    "allocate_bits",
    "build_bit_problem",
    "build_pairwise_matrix",
    "check_result",
    "choose_solver",
    "compute_dual_bound",
    "compute_interaction",
    "compute_objective",
    "compute_use",
    "expand_choice",
    "fix_units",
    "is_feasible",
    "list_efficient",
    "make_instance",
    "measure_regret",
    "merge_choice",
    "merge_ties",
    "predict_gain",
    "project_pairwise",
    "relax_by_cvxpy",
    "round_to_bits",
    "round_to_levels",
    "solve",
    "solve_constrained",
    "solve_diverse",
    "solve_frontier",
    "solve_least_cost",
    "solve_tied",
]
