"""Interactions: local search for the choice, a convex relaxation for the bound.

    minimise  sum_u loss[u, c_u] + rho * sum_{u<v} <sketch[:, u, c_u], sketch[:, v, c_v]>   under the limits

1. Diagonal optimum: the separable problem without the second part, solved exactly. It is the incumbent.
2. Local search (`local_search`) from it, from the given starts, from the optimum of the objective
   linearised at the relaxation's solution and at the incumbent, and from seeded random changes of the
   incumbent.
3. Bound: convex relaxation (`relaxation`), sharpened by solving its last linear problem over whole formats.

The result is never worse than the diagonal optimum; with a validation sketch, under neither sketch.

Complexity: see the parts. Limits: the search is a heuristic; the gap says how far it may be from the best.
Source: Deng et al., "Mixed-precision quantization with cross-layer dependencies" (CLADO), arXiv 2307.05657,
for the objective; we take the pairs from sketches instead of measuring each.
"""

import math
import time
from dataclasses import replace

import numpy as np

from solvers.certification import run_certified
from solvers.check import is_feasible
from solvers.knapsack import search_knapsack
from solvers.local_search import QuadraticTables, SearchState, compute_changes, improve, start_search
from solvers.multi_knapsack import search_multi_knapsack
from solvers.params import SolveParams
from solvers.problem import AllocationProblem, FloatArray, IntArray
from solvers.products import contract, dot
from solvers.relaxation import QuadraticBound, bound_quadratic
from solvers.result import Answer, SolveResult

RANDOM_STARTS = 8
CHANGED_FRACTION = 0.08
MAX_LINEARISATIONS = 5
JUMP_GAP = 1e-3
SHARPEN_GAP = 1e-6
MAX_SHARPEN_CANDIDATES = 300
BOUND_SHARE = 0.4


def solve_quadratic(problem: AllocationProblem, params: SolveParams) -> SolveResult:
    """Returns a choice no worse than the diagonal optimum, and its certified gap, for any number of
    limits."""
    if params.validation_sketch is None:
        return run_certified(problem, params, solver="quadratic", search=search_quadratic)
    params.check_fits(problem)

    # The search has the starts; the certificate would take the best of them by the first sketch alone.
    def search(problem: AllocationProblem, _: SolveParams) -> Answer:
        return search_quadratic(problem, params)

    return run_certified(problem, replace(params, starts=()), solver="quadratic", search=search)


def search_quadratic(problem: AllocationProblem, params: SolveParams) -> Answer:
    """Returns the answer of the quadratic solver."""
    deadline, bound_by = params.find_deadline(), params.find_deadline(BOUND_SHARE)
    diagonal = solve_separable(problem, problem.masked_loss, params)
    if problem.is_separable or diagonal.resource_at_fault is not None:
        return diagonal
    first = diagonal.choice
    if first is None:
        first = next((np.asarray(start) for start in params.starts if is_feasible(problem, start)), None)
    if first is None:
        # The bound of the separable problem says nothing about this one.
        return replace(diagonal, lower_bound=-math.inf)
    tables = build_tables(problem, params)
    relaxed = _bound(problem, tables, bound_by)
    best = _search(problem, params, tables, relaxed, first, deadline)
    lower_bound = max(relaxed.bound, _sharpen(problem, params, tables, relaxed))
    first_objective = start_search(tables, first).objectives[0]
    timed_out = time.perf_counter() > deadline
    return Answer(
        choice=best.choice,
        lower_bound=lower_bound,
        shadow_price=problem.spread_prices(relaxed.price),
        limit_hit="time" if timed_out else "iterations",
        detail=(
            f"local search from the diagonal optimum, objective {first_objective:.6g} to "
            f"{best.objectives[0]:.6g}; bound by convex relaxation"
        ),
        sketch_sum=relaxed.sketch_sum,
    )


def build_tables(problem: AllocationProblem, params: SolveParams) -> QuadraticTables:
    """Returns the tables of the local search; sketches are copied to [U, F, S], disallowed entries as 0."""
    sketches = []
    for sketch in (problem.sketch, params.validation_sketch):
        if sketch is not None:
            masked = np.where(problem.allowed, sketch, 0.0)
            sketches.append(np.ascontiguousarray(masked.transpose(1, 2, 0), dtype=np.float64))
    binding = list(problem.binding)
    return QuadraticTables(
        loss=problem.masked_loss,
        cost=problem.masked_cost[binding],
        limit=problem.target[binding],
        sketches=tuple(sketches),
        scale=problem.interaction_scale,
    )


def solve_separable(problem: AllocationProblem, loss: FloatArray, params: SolveParams) -> Answer:
    """Returns the answer for a separable loss [U, F] (inf where not allowed) under the problem's limits."""
    separable = replace(problem, loss=loss, sketch=None)
    plain = replace(params, starts=(), validation_sketch=None, trust_region=None)
    search = search_knapsack if len(problem.binding) <= 1 else search_multi_knapsack
    return search(separable, plain)


def _bound(problem: AllocationProblem, tables: QuadraticTables, deadline: float) -> QuadraticBound:
    sketch = tables.sketches[0]
    own = tables.loss - 0.5 * tables.scale * np.sum(sketch * sketch, axis=2)
    return bound_quadratic(own, sketch, tables.scale, tables.cost, tables.limit, deadline=deadline)


def _linearise(tables: QuadraticTables, sketch_sum: FloatArray) -> FloatArray:
    """Returns the linear part plus the interactions with a given sum of sketches, [U, F]."""
    sketch = tables.sketches[0]
    return np.asarray(
        tables.loss + tables.scale * (contract("ufs,s->uf", sketch, sketch_sum) - 0.5 * np.sum(sketch**2, axis=2))
    )


def _sharpen(
    problem: AllocationProblem, params: SolveParams, tables: QuadraticTables, relaxed: QuadraticBound
) -> float:
    """Returns the bound at the relaxation's W with whole formats instead of fractions."""
    if len(problem.binding) > 1 and int(problem.allowed.sum()) > MAX_SHARPEN_CANDIDATES:
        return relaxed.bound
    linear = _linearise(tables, relaxed.sketch_sum)
    answer = solve_separable(problem, linear, replace(params, relative_gap_tolerance=SHARPEN_GAP))
    return answer.lower_bound - 0.5 * tables.scale * dot(relaxed.sketch_sum, relaxed.sketch_sum)


def _search(
    problem: AllocationProblem,
    params: SolveParams,
    tables: QuadraticTables,
    relaxed: QuadraticBound,
    first: IntArray,
    deadline: float,
) -> SearchState:
    """Returns the best local optimum over all starts, no worse than the first under any sketch."""
    best = improve(tables, first, relaxed.price, deadline)
    rough = replace(params, relative_gap_tolerance=JUMP_GAP, node_limit=200_000)
    starts = [start for start in params.starts if is_feasible(problem, start)]
    rounded = solve_separable(problem, _linearise(tables, relaxed.sketch_sum), rough).choice
    starts += [rounded] if rounded is not None else []
    for start in starts:
        best = _better(best, improve(tables, np.asarray(start), relaxed.price, deadline))
    for _ in range(MAX_LINEARISATIONS):
        conditional = compute_changes(tables, best, 0)
        # Gaps are relative: measure them against the objective, not against the change of it.
        conditional += abs(best.objectives[0]) / problem.n_units
        jump = solve_separable(problem, conditional, rough).choice
        improved = best if jump is None else _better(best, improve(tables, jump, relaxed.price, deadline))
        if improved is best:
            break
        best = improved
    rng = np.random.default_rng(params.seed)
    for _ in range(RANDOM_STARTS):
        if time.perf_counter() > deadline:
            break
        shaken = _shake(problem, best.choice, rng)
        best = best if shaken is None else _better(best, improve(tables, shaken, relaxed.price, deadline))
    return best


def _shake(problem: AllocationProblem, choice: IntArray, rng: np.random.Generator) -> IntArray | None:
    """Returns the choice with some units at random allowed formats, repaired to the limits; None if that
    fails."""
    shaken = choice.copy()
    n_changed = max(1, math.ceil(CHANGED_FRACTION * choice.size))
    for unit in rng.choice(choice.size, size=n_changed, replace=False):
        shaken[unit] = rng.choice(np.flatnonzero(problem.allowed[unit]))
    for unit in rng.permutation(choice.size):
        if is_feasible(problem, shaken):
            return shaken
        shaken[unit] = choice[unit]
    return None


def _better(best: SearchState, other: SearchState) -> SearchState:
    return other if np.all(other.objectives < best.objectives) else best
