"""The one door: the table of solvers, and `solve`."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from solvers.baselines.annealing import solve_annealing
from solvers.baselines.budget_grid import solve_budget_grid
from solvers.baselines.greedy import solve_greedy
from solvers.baselines.rank_threshold import solve_rank_threshold
from solvers.exhaustive import solve_exhaustive
from solvers.knapsack import solve_knapsack
from solvers.lagrangian import solve_lagrangian
from solvers.milp import solve_milp
from solvers.multi_knapsack import solve_multi_knapsack
from solvers.params import SolveParams, TrustRegion
from solvers.problem import AllocationProblem
from solvers.pulp_backends import solve_cbc, solve_pulp_highs
from solvers.quadratic import solve_quadratic
from solvers.result import SolveResult

SOLVERS: dict[str, Callable[[AllocationProblem, SolveParams], SolveResult]] = {
    "knapsack": solve_knapsack,
    "lagrangian": solve_lagrangian,
    "multi_knapsack": solve_multi_knapsack,
    "milp": solve_milp,
    "cbc": solve_cbc,
    "pulp_highs": solve_pulp_highs,
    "quadratic": solve_quadratic,
    "exhaustive": solve_exhaustive,
    "greedy": solve_greedy,
    "annealing": solve_annealing,
    "budget_grid": solve_budget_grid,
    "rank_threshold": solve_rank_threshold,
}

CHANGED_UNITS = "changed_units"


def solve(problem: AllocationProblem, *, solver: str = "auto", params: SolveParams | None = None) -> SolveResult:
    """Returns the best choice found for a problem, its certified gap, and why the solver stopped.

    Args:
        problem: what to solve.
        solver: a name in SOLVERS, or "auto" to choose by shape; the result's detail says which and why.
        params: limits, tolerances and starts; the defaults when None.

    Raises:
        ValueError: an unknown solver, one that cannot take this problem, or params that do not fit it.
        SolverFailure: the solver's answer did not survive recomputation.
    """
    params = params or SolveParams()
    if solver != "auto" and solver not in SOLVERS:
        msg = f"solver must be auto or one of {', '.join(SOLVERS)}: got solver={solver!r}."
        raise ValueError(msg)
    params.check_fits(problem)
    if params.trust_region is not None:
        return _solve_in_trust_region(problem, params.trust_region, solver, params)
    name, why = choose_solver(problem) if solver == "auto" else (solver, "asked for")
    if params.validation_sketch is not None and name != "quadratic":
        msg = f"validation_sketch works with solver quadratic alone: got solver={name}. Leave it out."
        raise ValueError(msg)
    result = SOLVERS[name](problem, params)
    return replace(result, detail=f"{name} ({why}): {result.detail}")


def choose_solver(problem: AllocationProblem) -> tuple[str, str]:
    """Returns the name of the solver that suits a problem, and the reason."""
    if not problem.is_separable:
        return "quadratic", "the objective has interactions"
    if len(problem.binding) <= 1:
        return "knapsack", f"separable, {len(problem.binding)} limits can bind"
    return "multi_knapsack", f"separable, {len(problem.binding)} limits can bind"


def add_trust_region(problem: AllocationProblem, trust_region: TrustRegion) -> AllocationProblem:
    """Returns the problem with one more resource, the number of units that differ from the reference."""
    changed = np.arange(problem.n_formats) != np.asarray(trust_region.reference)[:, None]
    return replace(
        problem,
        cost=np.concatenate([problem.cost, changed[None].astype(np.float64)]),
        limit=np.append(problem.limit, float(trust_region.max_changes)),
        resources=(*problem.resources, CHANGED_UNITS),
    )


def _solve_in_trust_region(
    problem: AllocationProblem, trust_region: TrustRegion, solver: str, params: SolveParams
) -> SolveResult:
    """Solves with the trust region as a resource, and takes that resource out of the result again."""
    if CHANGED_UNITS in problem.resources:
        msg = f"no resource may be named {CHANGED_UNITS!r} with a trust region: got {problem.resources}."
        raise ValueError(msg)
    widened = add_trust_region(problem, trust_region)
    starts = (*params.starts, np.asarray(trust_region.reference, dtype=np.int64))
    result = solve(widened, solver=solver, params=replace(params, trust_region=None, starts=starts))
    return replace(
        result,
        use=result.use[:-1],
        shadow_price=result.shadow_price[:-1],
        least_use=result.least_use[:-1],
        resources=problem.resources,
        detail=f"at most {trust_region.max_changes} units changed; {result.detail}",
    )
