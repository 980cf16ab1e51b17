"""The verb plan: from a model or its profile and a budget to the best plan, predicted or measured."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from allocator.artefact_match import check_same_profile
from allocator.artefacts import Model, find_profile, model_to_measure, open_model, provenance
from allocator.budget import BIT_OPERATIONS, LATENCY, Budget
from allocator.competition import Competition, list_rivals
from allocator.engine_files import count_engine_file
from allocator.engine_rules import Optimum, price_rules, restrict_profile
from allocator.evolution import Evolution
from allocator.improvement import Improve
from allocator.planning import default_metric, find_assignment, make_plan
from allocator.plans import Plan
from allocator.problems import build_cost_tables
from allocator.progress import Progress, silent
from allocator.refinement import Refinement
from allocator.store import Store
from allocator.timings import describe_latency, find_latency, find_modelled_latency
from runtime.costs import CostTable
from runtime.device_models import find_device_model
from runtime.engine_rules import Engine
from runtime.engines import find_engine
from sensitivity.activation_losses import join_activations
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
    device: str | None = None,
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
        device: Name in ``DEVICE_MODELS`` whose modelled latency is limited; None for the device at hand, measured.
        store: Where profiles and scores are kept.
        progress: Called with (stage, done, total).

    Raises:
        InfeasibleBudget: If nothing keeps the budget.
        ArtefactMismatch: If the profile was measured on another model.
        ValueError: If the metric is not in the profile, refinement or evolution is asked for that cannot be, the
            budget has a context and the profile nothing of caches, the engine is unknown, or it runs none of the
            measured formats in some unit, or the device is unknown, or nothing limits its latency.
    """
    target = None if engine is None else find_engine(engine)
    _check_request(target, budget, verify=verify, refine=refine, evolve=evolve)
    _check_device(device, budget)
    store = store or Store()
    model = model if isinstance(model, SensitivityProfile) else open_model(model)
    if refine and isinstance(model, Model) and model.low_memory:
        msg = f"refinement needs the whole model in memory: got refine={refine} with low_memory. Leave out one of them."
        raise ValueError(msg)
    whole = _profile_to_plan(model, profile, budget, target, store, progress)

    def optimum(of: SensitivityProfile) -> Optimum:
        latency = _find_latency(of, budget, device, store, progress) if LATENCY in budget.limits else None
        tables = build_cost_tables(of, latency, batch_tokens=budget.batch)
        found = find_assignment(of, budget, tables, metric=metric or default_metric(whole), draft=not verify)
        return Optimum(profile=of, tables=tables, assignment=found)

    best = optimum(whole if target is None else restrict_profile(whole, target))
    rules = None if target is None else price_rules(target, kept=best, free=optimum(whole))
    if not verify:
        made = make_plan(best.profile, best.assignment, budget, best.tables, _describe_origin(best.tables))
        return replace(made, rules=rules)
    load_model = partial(model_to_measure, model, whole, store)
    shared = {"store": store, "progress": progress, "load_model": load_model}
    made = _find_best_measured(best, budget, shared, refine=refine, evolve=evolve, only_metric=metric is not None)
    return replace(made, rules=rules)


def _find_best_measured(
    best: Optimum, budget: Budget, shared: dict[str, Any], *, refine: int, evolve: int, only_metric: bool
) -> Plan:
    """Returns the best of an optimum, its rivals and what refinement and evolution make of them, all measured."""
    shared = {**shared, "profile": best.profile, "budget": budget, "tables": best.tables}
    improvements: list[Improve] = []
    if refine:
        improvements.append(Refinement(**shared, rounds=refine).run)
    if evolve:
        improvements.append(Evolution(**shared, passes=evolve).run)
    rivals = list_rivals(best.profile, budget, best.tables, best.assignment, only_metric=only_metric)
    return Competition(**shared, provenance=_describe_origin(best.tables)).run(best.assignment, rivals, improvements)


def _find_latency(
    profile: SensitivityProfile, budget: Budget, device: str | None, store: Store, progress: Progress
) -> CostTable:
    if device is None:
        return find_latency(profile, store, progress)
    return find_modelled_latency(profile, device, batch_tokens=budget.batch)


def _describe_origin(tables: Mapping[str, CostTable]) -> dict[str, str]:
    return {**provenance(), **describe_latency(tables)}


def _check_device(device: str | None, budget: Budget) -> None:
    if device is None:
        return
    find_device_model(device)
    if LATENCY not in budget.limits:
        msg = (
            f"a device is what a latency is limited on: got device='{device}' and no limit on {LATENCY}. Add one, such "
            f"as --limit {LATENCY}=900, or leave the device out."
        )
        raise ValueError(msg)


def _check_request(target: Engine | None, budget: Budget, *, verify: bool, refine: int, evolve: int) -> None:
    if target is not None and budget.context is not None:
        msg = (
            f"an engine's rules say nothing of caches: got engine='{target.name}' and a budget with "
            f"context={budget.context}. Leave one of them out."
        )
        raise ValueError(msg)
    if BIT_OPERATIONS in budget.limits and (refine or evolve or target is not None):
        engine = None if target is None else target.name
        msg = (
            f"a limit on bit operations is kept by the solve alone: got it with engine={engine}, refine={refine}, "
            f"evolve={evolve}. Leave these out."
        )
        raise ValueError(msg)
    if (refine or evolve) and not verify:
        msg = (
            f"refinement and evolution measure: got refine={refine}, evolve={evolve} without verification. Verify, or "
            "leave them out."
        )
        raise ValueError(msg)


def _profile_to_plan(
    model: Model | SensitivityProfile,
    profile: SensitivityProfile | None,
    budget: Budget,
    target: Engine | None,
    store: Store,
    progress: Progress,
) -> SensitivityProfile:
    """Returns the profile that a budget is asked of: with the caches it names, and the bytes of the engine's file."""
    if profile is not None and isinstance(model, Model):
        check_same_profile(profile.provenance["model_fingerprint"], model.fingerprint, model.source)
    whole = profile or find_profile(model, store=store, progress=progress)
    if budget.context is not None:
        whole = join_cache(whole, context=budget.context, batch=budget.batch)
    if BIT_OPERATIONS in budget.limits:
        whole = join_activations(whole)
    return whole if target is None else count_engine_file(model, whole, target, store)
