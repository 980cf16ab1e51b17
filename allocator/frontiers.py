"""The frontier: the least predicted loss at every size, each point with its bound and the price of one more MiB."""

import numpy as np

from allocator.artefacts import Model, find_profile
from allocator.assignments import cache_use
from allocator.budget import MEMORY
from allocator.notebook import Frontier
from allocator.planning import default_metric
from allocator.problems import build_cost_tables, build_problem
from allocator.progress import Progress, silent
from allocator.store import Store
from runtime.costs import CostTable
from runtime.units import count_weights
from sensitivity.cache_losses import join_cache
from sensitivity.profile import SensitivityProfile
from solvers import SolveResult, solve_frontier


def frontier(
    model: str | Model | SensitivityProfile,
    *,
    points: int = 33,
    metric: str | None = None,
    context: int | None = None,
    batch: int = 1,
    store: Store | None = None,
    progress: Progress = silent,
) -> Frontier:
    """Returns the least loss at ``points`` memory budgets, from the smallest reachable to the largest useful.

    Each point has ``memory_bytes`` (used), ``bits_per_weight``, ``predicted_loss`` and ``lower_bound`` (nats per
    token), and ``shadow_price_per_mib``.

    Args:
        model: A model, or its profile.
        points: Budgets to solve.
        metric: Metric to plan with; None for the best one held.
        context: Tokens that each sequence keeps in the cache, which is then part of the memory; None to leave it out.
        batch: Sequences with a cache.
        store: Where profiles are kept.
        progress: Called with (stage, done, total).

    Raises:
        ValueError: If the metric is not in the profile, or a context is given and the profile knows nothing of caches.
    """
    profile = find_profile(model, store=store or Store(), progress=progress)
    if context is not None:
        profile = join_cache(profile, context=context, batch=batch)
    tables = build_cost_tables(profile)
    problem = build_problem(profile, profile.table(metric or default_metric(profile)).loss, {}, tables)
    memory = np.where(problem.allowed, problem.cost[0], np.nan)
    least, most = np.nanmin(memory, axis=1).sum(), np.nanmax(memory, axis=1).sum()
    limits = np.linspace(least, most, points)
    results = solve_frontier(problem, limits=limits)
    return Frontier(_frontier_point(profile, result, tables[MEMORY]) for result in results if result.choice is not None)


def _frontier_point(profile: SensitivityProfile, result: SolveResult, memory: CostTable) -> dict[str, float]:
    assert result.choice is not None
    memory_bytes = float(result.use[0]) + memory.fixed
    weight_bytes = float(result.use[0]) - cache_use(profile.candidates, result.choice, memory)
    return {
        "memory_bytes": memory_bytes,
        "bits_per_weight": 8.0 * weight_bytes / count_weights(profile.candidates.units),
        "predicted_loss": result.objective,
        "lower_bound": result.lower_bound,
        "shadow_price_per_mib": float(result.shadow_price[0]) * 2**20,
    }
