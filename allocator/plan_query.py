"""The verb plan: from a model or its profile and a budget to the best plan, predicted or measured."""

from dataclasses import replace
from functools import partial
from typing import Any

from allocator.artefacts import Model, find_profile, model_to_measure, open_model, provenance
from allocator.budget import LATENCY, Budget
from allocator.competition import Competition, list_rivals
from allocator.engine_rules import Optimum, engine_fixed_bytes, price_rules, restrict_profile
from allocator.evolution import Evolution
from allocator.improvement import Improve
from allocator.planning import default_metric, find_assignment, make_plan
from allocator.plans import Plan, check_same_profile
from allocator.problems import build_cost_tables
from allocator.progress import Progress, silent
from allocator.refinement import Refinement
from allocator.store import Store
from allocator.timings import find_latency
from runtime.engines import find_engine
from sensitivity.cache_losses import join_cache
from sensitivity.profile import SensitivityProfile


def plan(
    model: str | Model | SensitivityProfile,
    budget: Budget,
    *,
    verify: bool = True,
    metric: str | None = None,
    refine: int = 0,
    evolve: int = 0,
    profile: SensitivityProfile | None = None,
    engine: str | None = None,
    store: Store | None = None,
    progress: Progress = silent,
) -> Plan:
    """Returns the best plan for a budget.

    Without ``verify`` this is one solve of the cached profile: milliseconds, exact but where several limits bind and
    the proof would take longer (the plan states its gap). With it, plans by several
    metrics, one with cross terms, and every uniform format that fits are measured on text that nothing else saw,
    and the best of them is returned, a uniform one included. With ``refine`` that best one is then improved around
    itself (``allocator.refinement``), with ``evolve`` by random switches (``allocator.evolution``): minutes, worth
    them where plans lose much.

    Args:
        model: A model, or its profile. Of a model the latest profile is taken, or measured with the defaults.
        budget: The budget.
        verify: Whether to measure. A profile alone can be verified only from scores in the store.
        metric: Metric to plan with; None for the best one held (and its rivals, when verifying).
        refine: The most rounds of refinement; they need ``verify``.
        evolve: The most passes of evolution, after refinement where both are asked for; they need ``verify``.
        profile: Profile to use instead of the model's latest.
        engine: Name in ``ENGINES``; the plan then keeps its rules, and says what they cost.
        store: Where profiles and scores are kept.
        progress: Called with (stage, done, total).

    Raises:
        InfeasibleBudget: If nothing keeps the budget.
        ArtefactMismatch: If the profile was measured on another model.
        ValueError: If the metric is not in the profile, refinement or evolution is asked for that cannot be, the
            budget has a context and the profile nothing of caches, the engine is unknown, or it runs none of the
            measured formats in some unit.
    """
    target = None if engine is None else find_engine(engine)
    if target is not None and budget.context is not None:
        msg = (
            f"an engine's rules say nothing of caches: got engine='{engine}' and a budget with "
            f"context={budget.context}. Leave one of them out."
        )
        raise ValueError(msg)
    if (refine or evolve) and not verify:
        msg = (
            f"refinement and evolution measure: got refine={refine}, evolve={evolve} without verification. Verify, or "
            "leave them out."
        )
        raise ValueError(msg)
    store = store or Store()
    model = model if isinstance(model, SensitivityProfile) else open_model(model)
    if refine and isinstance(model, Model) and model.low_memory:
        msg = f"refinement needs the whole model in memory: got refine={refine} with low_memory. Leave out one of them."
        raise ValueError(msg)
    if profile is not None and isinstance(model, Model):
        check_same_profile(profile.provenance["model_fingerprint"], model.fingerprint, model.source)
    whole = profile or find_profile(model, store=store, progress=progress)
    if budget.context is not None:
        whole = join_cache(whole, context=budget.context, batch=budget.batch)
    if target is not None and isinstance(model, Model):
        # Bytes are those of the file that the engine loads, where they are known.
        routers = any(unit.kind == "router" for unit in whole.candidates.units)
        fixed = engine_fixed_bytes(target, model.reference_of(whole, store), routers=routers)
        whole = whole if fixed is None else replace(whole, fixed_bytes=fixed)
    chosen = metric or default_metric(whole)

    def optimum(of: SensitivityProfile) -> Optimum:
        latency = find_latency(of, store, progress) if LATENCY in budget.limits else None
        tables = build_cost_tables(of, latency, batch_tokens=budget.batch)
        found = find_assignment(of, budget, tables, metric=chosen, draft=not verify)
        return Optimum(profile=of, tables=tables, assignment=found)

    best = optimum(whole if target is None else restrict_profile(whole, target))
    rules = None if target is None else price_rules(target, kept=best, free=optimum(whole))
    if not verify:
        made = make_plan(best.profile, best.assignment, budget, best.tables, provenance())
        return replace(made, rules=rules)
    shared: dict[str, Any] = {
        "profile": best.profile,
        "budget": budget,
        "tables": best.tables,
        "store": store,
        "progress": progress,
        "load_model": partial(model_to_measure, model, whole, store),
    }
    improvements: list[Improve] = []
    if refine:
        improvements.append(Refinement(**shared, rounds=refine).run)
    if evolve:
        improvements.append(Evolution(**shared, passes=evolve).run)
    rivals = list_rivals(best.profile, budget, best.tables, best.assignment, only_metric=metric is not None)
    competition = Competition(**shared, provenance=provenance())
    return replace(competition.run(best.assignment, rivals, improvements), rules=rules)
