"""The verbs: measure, plan, frontier, evaluate, apply, load, report. Composition only; the work is in the rooms."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from allocator.artefacts import Model, assignment_of_plan, find_profile, open_model, profile_of_plan
from allocator.assignments import list_uniform, use_of
from allocator.budget import LATENCY, MEMORY, Budget
from allocator.competition import Competition, list_rivals
from allocator.engine_rules import Optimum, engine_fixed_bytes, price_rules, restrict_profile
from allocator.measuring import MeasureRequest, run_measurement
from allocator.planning import default_metric, find_assignment, make_plan
from allocator.plans import Evaluation, Plan, check_same_model, check_same_profile
from allocator.problems import build_cost_tables, build_problem
from allocator.progress import Progress, silent
from allocator.refinement import Refinement
from allocator.renderings import needs_statistics, rendering_of_plan
from allocator.store import Store
from allocator.timings import find_latency
from allocator.verification import REFERENCE, make_evaluation, score_cached
from runtime.checkpoint import fixed_bytes
from runtime.costs import CostTable
from runtime.engines import find_engine
from runtime.packed_model import check_packed_place, load_packed, save_packed_
from sensitivity.calibration import read_sequences
from sensitivity.profile import SensitivityProfile
from solvers import SolveResult, solve_frontier


def measure(
    model: str | Model,
    *,
    request: MeasureRequest | None = None,
    store: Store | None = None,
    progress: Progress = silent,
) -> SensitivityProfile:
    """Returns the sensitivity profile of a model, measured now or found in the store.

    Args:
        model: A Hugging Face directory or id, a GGUF file, or a ``Model``.
        request: What to measure, on which text; None for the defaults.
        store: Where profiles are kept; None for the default.
        progress: Called with (stage, done, total).

    Raises:
        ValueError: If the model, the text or the request is wrong.
    """
    model = open_model(model)
    return run_measurement(model.reference, request or MeasureRequest(), store or Store(), progress)


def plan(
    model: str | Model | SensitivityProfile,
    budget: Budget,
    *,
    verify: bool = True,
    metric: str | None = None,
    refine: int = 0,
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
    itself (``allocator.refinement``): minutes, worth them where plans lose much.

    Args:
        model: A model, or its profile. Of a model the latest profile is taken, or measured with the defaults.
        budget: The budget.
        verify: Whether to measure. A profile alone can be verified only from scores in the store.
        metric: Metric to plan with; None for the best one held (and its rivals, when verifying).
        refine: The most rounds of refinement; they need ``verify``.
        profile: Profile to use instead of the model's latest.
        engine: Name in ``ENGINES``; the plan then keeps its rules, and says what they cost.
        store: Where profiles and scores are kept.
        progress: Called with (stage, done, total).

    Raises:
        InfeasibleBudget: If nothing keeps the budget.
        ArtefactMismatch: If the profile was measured on another model.
        ValueError: If the metric is not in the profile, refinement is asked for that cannot be, the engine is unknown,
            or it runs none of the measured formats in some unit.
    """
    target = None if engine is None else find_engine(engine)
    if refine and not verify:
        msg = f"refinement measures: got refine={refine} without verification. Verify, or leave refine out."
        raise ValueError(msg)
    store = store or Store()
    model = model if isinstance(model, SensitivityProfile) else open_model(model)
    if profile is not None and isinstance(model, Model):
        check_same_profile(profile.provenance["model_fingerprint"], model.fingerprint, model.source)
    whole = profile or find_profile(model, store=store, progress=progress)
    if target is not None and isinstance(model, Model):
        # Bytes are those of the file that the engine loads, where they are known.
        fixed = engine_fixed_bytes(target, model.reference)
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
        "load_model": partial(_load_model, model),
    }
    refinement = Refinement(**shared, rounds=refine) if refine else None
    rivals = list_rivals(best.profile, budget, best.tables, best.assignment, only_metric=metric is not None)
    competition = Competition(**shared, provenance=provenance())
    made = competition.run(best.assignment, rivals, refinement.run if refinement else None)
    return replace(made, rules=rules)


def frontier(
    model: str | Model | SensitivityProfile,
    *,
    points: int = 33,
    metric: str | None = None,
    store: Store | None = None,
    progress: Progress = silent,
) -> list[dict[str, float]]:
    """Returns the least loss at ``points`` memory budgets, from the smallest reachable to the largest useful.

    Each point has ``memory_bytes`` (used), ``bits_per_weight``, ``predicted_loss`` and ``lower_bound`` (nats per
    token), and ``shadow_price_per_mib``.
    """
    profile = find_profile(model, store=store or Store(), progress=progress)
    tables = build_cost_tables(profile)
    problem = build_problem(profile, profile.table(metric or default_metric(profile)).loss, {}, tables)
    memory = np.where(problem.allowed, problem.cost[0], np.nan)
    least, most = np.nanmin(memory, axis=1).sum(), np.nanmax(memory, axis=1).sum()
    limits = np.linspace(least, most, points)
    results = solve_frontier(problem, limits=limits)
    return [_frontier_point(profile, result, tables[MEMORY]) for result in results if result.choice is not None]


def evaluate(
    model: str | Model,
    plan: Plan,
    *,
    text: str | None = None,
    sequences: int | None = None,
    sequence_tokens: int = 256,
    store: Store | None = None,
    progress: Progress = silent,
) -> list[Evaluation]:
    """Returns the measured quality of the reference, the plan, and every uniform format of no more bytes.

    Args:
        model: The model the plan was made for.
        plan: The plan.
        text: A text source nothing else saw; None for the profile's own evaluation text.
        sequences: Sequences taken from the text, at least 2; None for as many as it holds, up to 32.
        sequence_tokens: Tokens of each.
        store: Where profiles and scores are kept.
        progress: Called with (stage, done, total).

    Raises:
        ArtefactMismatch: If the plan was made for another model.
        ValueError: If the text is missing or too short, or no text is named and the plan's profile is not stored.
    """
    store = store or Store()
    model = open_model(model)
    check_same_model(plan, model.fingerprint, str(model.path))
    # Another profile may have been rendered with other statistics.
    profile = profile_of_plan(plan, model, store, progress, own=text is None or needs_statistics(plan))
    profile = replace(profile, fixed_bytes=plan.fixed_bytes)
    tokens = profile.evaluation_tokens
    if text is not None:
        taken = read_sequences(text, model.reference.tokenizer, sequences=sequences, sequence_tokens=sequence_tokens)
        tokens = taken.tokens.numpy()
    tables = build_cost_tables(profile)
    planned = assignment_of_plan(profile, plan)
    fitting = [
        a
        for a in list_uniform(profile.candidates, planned.metric)
        if use_of(a.choice, tables)[MEMORY] <= plan.memory_bytes and a.choice.tobytes() != planned.choice.tobytes()
    ]
    assignments = [planned, *fitting]
    formats: dict[str, Mapping[str, str]] = {REFERENCE: {}}
    formats |= {a.name: a.formats_by_weight(profile.candidates) for a in assignments}
    scores = score_cached(
        profile, formats, tokens, load_model=lambda: model.reference.model, store=store, progress=progress
    )
    memory = tables[MEMORY]
    return [make_evaluation(profile, None, scores[REFERENCE], tokens, memory)] + [
        make_evaluation(profile, a, scores[a.name], tokens, memory, shipped=a is planned) for a in assignments
    ]


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A packed model on disk.

    Args:
        directory: Where it is.
        file_bytes: Size of its weight file.
        predicted_bytes: Size that the plan predicted.
    """

    directory: Path
    file_bytes: int
    predicted_bytes: int


def apply(model: str | Model, plan: Plan, out: Path, *, store: Store | None = None) -> Applied:
    """Packs a model by a plan and writes it to a directory, which is replaced as a whole.

    Args:
        model: The model the plan was made for.
        plan: The plan.
        out: Directory of the packed model.
        store: Where the plan's profile is kept, which only some quantizers need; None for the default.

    Raises:
        ArtefactMismatch: If the plan was made for another model.
        ValueError: If something else than a packed model is at ``out``, the model cannot be read, or the quantizer
            needs input statistics that the store can no longer give.
    """
    model = open_model(model)
    check_same_model(plan, model.fingerprint, str(model.path))
    check_packed_place(out)
    reference = model.load_again()
    rule = rendering_of_plan(plan, reference.model, store or Store())
    predicted_bytes = plan.memory_bytes
    if plan.rules is not None:
        # The plan counts the engine's file; this one has a header of its own.
        predicted_bytes += fixed_bytes(reference.model) - plan.fixed_bytes
    file_bytes = save_packed_(reference, plan.weights, out, metadata=plan.header_metadata(), quantizer=rule)
    return Applied(directory=out, file_bytes=file_bytes, predicted_bytes=predicted_bytes)


def load(directory: str | Path) -> tuple[Any, Any]:
    """Returns a packed model and its tokenizer.

    Raises:
        ValueError: If the directory holds no packed model, or its file is incomplete.
    """
    model, tokenizer, _ = load_packed(Path(directory))
    return model, tokenizer


def report(
    model: str | Model,
    plan: Plan,
    out: Path,
    *,
    text: str | None = None,
    store: Store | None = None,
    progress: Progress = silent,
) -> Path:
    """Writes the report of a plan, ``report.html`` and CSV files, and returns the page's path.

    Args:
        model: The model the plan was made for.
        plan: The plan.
        out: Directory of the files.
        text: Evaluation text; None for the profile's own.
        store: Where profiles and scores are kept.
        progress: Called with (stage, done, total).
    """
    from allocator.tables import make_report
    from reports import write_csv, write_html

    store = store or Store()
    model = open_model(model)
    evaluations = evaluate(model, plan, text=text, store=store, progress=progress)
    profile = replace(profile_of_plan(plan, model, store, progress, own=False), fixed_bytes=plan.fixed_bytes)
    content = make_report(profile, plan, evaluations, frontier(profile, store=store))
    out.mkdir(parents=True, exist_ok=True)
    write_csv(content, out)
    write_html(content, out / "report.html")
    return out / "report.html"


def provenance() -> dict[str, str]:
    """Returns the versions and the moment of a plan."""
    return {
        "bitplan": version("bitplan"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _load_model(model: Model | SensitivityProfile) -> Any:
    if isinstance(model, SensitivityProfile):
        msg = "a plan must be verified with its model: got a profile alone. Pass the model, or verify=False."
        raise ValueError(msg)
    return model.reference.model


def _frontier_point(profile: SensitivityProfile, result: SolveResult, memory: CostTable) -> dict[str, float]:
    memory_bytes = float(result.use[0]) + memory.fixed
    weights = sum(unit.weight_count for unit in profile.candidates.units)
    return {
        "memory_bytes": memory_bytes,
        "bits_per_weight": 8.0 * float(result.use[0]) / weights,
        "predicted_loss": result.objective,
        "lower_bound": result.lower_bound,
        "shadow_price_per_mib": float(result.shadow_price[0]) * 2**20,
    }
