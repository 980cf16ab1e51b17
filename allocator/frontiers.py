"""The frontier: the least predicted loss at every size, each point with its bound and the price of one more MiB.

Of another resource than memory, such as the latency of a step, it is the same along that resource.
"""

from collections.abc import Mapping

import numpy as np

from allocator.artefacts import Model, find_profile, open_model
from allocator.assignments import cache_use, pick
from allocator.budget import FRONTIER_RESOURCES, LATENCY, MEMORY
from allocator.engine_files import count_engine_file
from allocator.engine_rules import restrict_profile
from allocator.notebook import Frontier
from allocator.planning import default_metric
from allocator.problems import build_cost_tables
from allocator.progress import Progress, silent
from allocator.store import Store
from allocator.timings import find_latency
from runtime.costs import CostTable
from runtime.engines import find_engine
from runtime.units import count_weights
from sensitivity.cache_losses import join_cache
from sensitivity.profile import SensitivityProfile
from solvers import AllocationProblem, SolveResult, solve_frontier


def frontier(
    model: str | Model | SensitivityProfile,
    *,
    points: int = 33,
    metric: str | None = None,
    resource: str = MEMORY,
    engine: str | None = None,
    context: int | None = None,
    batch: int = 1,
    store: Store | None = None,
    progress: Progress = silent,
) -> Frontier:
    """Returns the least loss at ``points`` budgets of a resource, from the smallest reachable to the largest useful.

    Each point has ``memory_bytes`` (used), ``bits_per_weight``, ``predicted_loss`` and ``lower_bound`` (nats per
    token), and ``shadow_price_per_mib``; along another resource its use, by its name, and ``shadow_price`` instead.

    Args:
        model: A model, or its profile.
        points: Budgets to solve.
        metric: Metric to plan with; None for the best one held.
        resource: Name in ``FRONTIER_RESOURCES``: what is limited. Latencies are measured on this machine, or found in
            the store.
        engine: Engine whose rules every point keeps, or None.
        context: Tokens that each sequence keeps in the cache, which is then part of the memory; None to leave it out.
        batch: Sequences with a cache.
        store: Where profiles are kept.
        progress: Called with (stage, done, total).

    Raises:
        ValueError: If the metric is not in the profile, the resource or the engine is unknown, a context is given and
            the profile knows nothing of caches, or the engine runs none of the measured formats in some unit.
    """
    store = store or Store()
    _check_resource(resource)
    model = model if isinstance(model, SensitivityProfile) else open_model(model)
    profile = find_profile(model, store=store, progress=progress)
    if context is not None:
        profile = join_cache(profile, context=context, batch=batch)
    if engine is not None:
        target = find_engine(engine)
        profile = restrict_profile(count_engine_file(model, profile, target, store), target)
    latency = find_latency(profile, store, progress) if resource == LATENCY else None
    tables = build_cost_tables(profile, latency, batch_tokens=batch)
    return frontier_along(profile, tables, resource=resource, points=points, metric=metric)


def _check_resource(resource: str) -> None:
    if resource not in FRONTIER_RESOURCES:
        msg = f"a frontier must be along one of {', '.join(FRONTIER_RESOURCES)}: got '{resource}'. Name one of them."
        raise ValueError(msg)


def frontier_along(
    profile: SensitivityProfile,
    tables: Mapping[str, CostTable],
    *,
    resource: str = MEMORY,
    points: int = 33,
    metric: str | None = None,
) -> Frontier:
    """Returns the frontier of a profile that is priced; arguments as of ``frontier``.

    Args:
        profile: The profile, on the axes that are asked for.
        tables: Resource -> cost table, with memory and the resource.
        resource: What is limited.
        points: Budgets to solve.
        metric: Metric to plan with; None for the best one held.

    Raises:
        ValueError: If the metric is not in the profile.
    """
    table = tables[resource]
    loss = profile.table(metric or default_metric(profile)).loss
    problem = AllocationProblem(
        loss=loss,
        cost=table.cost[None],
        limit=np.array([np.inf]),
        allowed=profile.candidates.allowed,
        resources=(resource,),
    )
    cost = np.where(problem.allowed, table.cost, np.inf)
    # More than the cheapest of the candidates that lose least is of no use.
    least_loss = problem.masked_loss.min(axis=1, keepdims=True)
    most = np.where(problem.masked_loss <= least_loss, cost, np.inf).min(axis=1).sum()
    limits = np.linspace(cost.min(axis=1).sum(), most, points)
    results = solve_frontier(problem, limits=limits)
    return Frontier(_frontier_point(profile, result, tables) for result in results if result.choice is not None)


def _frontier_point(
    profile: SensitivityProfile, result: SolveResult, tables: Mapping[str, CostTable]
) -> dict[str, float]:
    assert result.choice is not None
    [resource], memory = result.resources, tables[MEMORY]
    unit_bytes = float(pick(memory.cost, result.choice).sum())
    weight_bytes = unit_bytes - cache_use(profile.candidates, result.choice, memory)
    price = float(result.shadow_price[0])
    own = {resource: float(result.use[0]) + tables[resource].fixed, "shadow_price": price}
    return {
        "memory_bytes": unit_bytes + memory.fixed,
        "bits_per_weight": 8.0 * weight_bytes / count_weights(profile.candidates.units),
        "predicted_loss": result.objective,
        "lower_bound": result.lower_bound,
        **({"shadow_price_per_mib": price * 2**20} if resource == MEMORY else own),
    }
