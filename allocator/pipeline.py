"""The verbs: measure, plan, frontier, evaluate, apply, load, report. Composition only; the work is in the rooms."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from allocator.assignments import Assignment, list_uniform, use_of
from allocator.budget import LATENCY, MEMORY, Budget
from allocator.measuring import MeasureRequest, run_measurement
from allocator.plans import Evaluation, Plan, check_same_model
from allocator.planning import default_metric, find_assignment, find_interacting_assignment, make_plan
from allocator.problems import build_cost_tables, build_problem, resolve_limits
from allocator.progress import Progress, silent
from allocator.store import Store
from allocator.verification import REFERENCE, choose_best, describe_choice, make_evaluation, score_cached
from runtime.costs import CostTable
from runtime.latency import measure_latency
from runtime.loading import ReferenceModel, find_model, fingerprint_model, load_reference
from runtime.packed_model import load_packed, save_packed_
from sensitivity.calibration import read_documents, tokenize_documents
from sensitivity.measure import FISHER, SINGLE_UNIT_KL
from sensitivity.profile import NATS, SensitivityProfile
from solvers import SolveResult, solve_frontier


class Model:
    """A model by name, found and fingerprinted at once, loaded when first needed.

    Args:
        source: A Hugging Face directory or id, or a GGUF file.
    """

    def __init__(self, source: str) -> None:
        self.path = find_model(source)
        self.fingerprint = fingerprint_model(self.path)

    @cached_property
    def reference(self) -> ReferenceModel:
        """The model in float32 with its tokenizer."""
        return load_reference(str(self.path))


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
    model = model if isinstance(model, Model) else Model(model)
    return run_measurement(model.reference, request or MeasureRequest(), store or Store(), progress)


def plan(
    model: str | Model | SensitivityProfile,
    budget: Budget,
    *,
    verify: bool = True,
    metric: str | None = None,
    profile: SensitivityProfile | None = None,
    store: Store | None = None,
    progress: Progress = silent,
) -> Plan:
    """Returns the best plan for a budget.

    Without ``verify`` this is one exact solve of the cached profile: milliseconds. With it, plans by several
    metrics, one with cross terms, and every uniform format that fits are measured on text that nothing else saw,
    and the best of them is returned, a uniform one included.

    Args:
        model: A model, or its profile. Of a model the latest profile is taken, or measured with the defaults.
        budget: The budget.
        verify: Whether to measure. A profile alone can be verified only from scores in the store.
        metric: Metric to plan with; None for the best one held (and its rivals, when verifying).
        profile: Profile to use instead of the model's latest.
        store: Where profiles and scores are kept.
        progress: Called with (stage, done, total).

    Raises:
        InfeasibleBudget: If nothing keeps the budget.
        ValueError: If the metric is not in the profile.
    """
    store = store or Store()
    profile = profile or find_profile(model, store=store, progress=progress)
    tables = build_cost_tables(profile, _latency(profile, budget, progress))
    chosen = metric or default_metric(profile)
    best = find_assignment(profile, budget, tables, metric=chosen)
    if not verify:
        return make_plan(profile, best, budget, tables, provenance())
    context = _Verification(profile, budget, tables, store, progress, _model_loader(model))
    return context.run(best, list_rivals(profile, budget, tables, best, only_metric=metric is not None))


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
        sequences: Sequences taken from the text; None for as many as it holds, up to 32.
        sequence_tokens: Tokens of each.
        store: Where profiles and scores are kept.
        progress: Called with (stage, done, total).

    Raises:
        ArtefactMismatch: If the plan was made for another model.
        ValueError: If the text is missing or too short.
    """
    store = store or Store()
    model = model if isinstance(model, Model) else Model(model)
    check_same_model(plan, model.fingerprint, str(model.path))
    profile = profile_of_plan(plan, model, store, progress)
    tokens = profile.evaluation_tokens
    if text is not None:
        tokens = _read_tokens(model.reference, text, sequences, sequence_tokens)
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


def apply(model: str | Model, plan: Plan, out: Path) -> Applied:
    """Packs a model by a plan and writes it to a directory, which is replaced as a whole.

    Raises:
        ArtefactMismatch: If the plan was made for another model.
    """
    model = model if isinstance(model, Model) else Model(model)
    check_same_model(plan, model.fingerprint, str(model.path))
    reference = load_reference(str(model.path))
    file_bytes = save_packed_(
        reference, plan.weights, out, metadata=plan.header_metadata(), quantizer=plan.provenance["quantizer"]
    )
    return Applied(directory=out, file_bytes=file_bytes, predicted_bytes=plan.memory_bytes)


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
    model = model if isinstance(model, Model) else Model(model)
    evaluations = evaluate(model, plan, text=text, store=store, progress=progress)
    profile = profile_of_plan(plan, model, store, progress)
    content = make_report(profile, plan, evaluations, frontier(profile, store=store))
    out.mkdir(parents=True, exist_ok=True)
    write_csv(content, out)
    write_html(content, out / "report.html")
    return out / "report.html"


def find_profile(
    model: str | Model | SensitivityProfile, *, store: Store, progress: Progress = silent
) -> SensitivityProfile:
    """Returns the profile itself, a model's latest profile, or a new one measured with the defaults."""
    if isinstance(model, SensitivityProfile):
        return model
    model = model if isinstance(model, Model) else Model(model)
    return store.find_latest_profile(model.fingerprint) or measure(model, store=store, progress=progress)


def profile_of_plan(plan: Plan, model: Model, store: Store, progress: Progress) -> SensitivityProfile:
    """Returns the profile a plan was made from, or the model's latest when the store no longer has it."""
    return store.find_profile(plan.provenance["profile"]) or find_profile(model, store=store, progress=progress)


def assignment_of_plan(profile: SensitivityProfile, plan: Plan) -> Assignment:
    """Returns the assignment that a plan stands for, on a profile's axes."""
    choice = [profile.candidates.format_index(plan.weights[u.weights[0].name]) for u in profile.candidates.units]
    kind = "uniform" if plan.termination == "uniform rule" else "plan"
    return Assignment(name=plan.name, kind=kind, metric=plan.metric, choice=np.array(choice, dtype=np.int64))


def list_rivals(
    profile: SensitivityProfile,
    budget: Budget,
    tables: Mapping[str, CostTable],
    best: Assignment,
    *,
    only_metric: bool = False,
) -> list[Assignment]:
    """Returns what is measured beside the best predicted assignment: other metrics, cross terms, uniform formats."""
    rivals: list[Assignment] = []
    if not only_metric:
        others = [m for m in (FISHER, SINGLE_UNIT_KL) if m in profile.losses and m != best.metric]
        rivals += [find_assignment(profile, budget, tables, metric=metric) for metric in others]
    if profile.logit_gram is not None and budget.max_kl is None and profile.table(best.metric).unit_of_measure == NATS:
        rivals.append(find_interacting_assignment(profile, budget, tables, metric=best.metric)[0])
    limits = resolve_limits(profile, budget)
    rivals += [
        a
        for a in list_uniform(profile.candidates, best.metric)
        if all(use_of(a.choice, tables)[name] <= limit for name, limit in limits.items())
    ]
    distinct = {best.choice.tobytes(): best}
    for rival in rivals:
        distinct.setdefault(rival.choice.tobytes(), rival)
    return list(distinct.values())[1:]


def provenance() -> dict[str, str]:
    """Returns the versions and the moment of a plan."""
    return {
        "bitplan": version("bitplan"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


@dataclass(frozen=True)
class _Verification:
    profile: SensitivityProfile
    budget: Budget
    tables: Mapping[str, CostTable]
    store: Store
    progress: Progress
    load_model: Callable[[], Any]
    rounds: int = 4

    def run(self, best: Assignment, rivals: Sequence[Assignment]) -> Plan:
        """Returns the plan of the best measured assignment, tightening a ceiling on KL until one keeps it."""
        assignments = [best, *rivals]
        scores = self._score(assignments)
        winner = choose_best(assignments, scores, self.tables[MEMORY], self.budget)
        if self.budget.max_kl is not None:
            assignments, scores, winner = self._approach_ceiling(best, assignments)
        if winner is None:
            least = {MEMORY: use_of(best.choice, self.tables)[MEMORY]}
            from allocator.budget import InfeasibleBudget

            msg = f"a ceiling on KL must be reachable: got '{self.budget.describe()}', which no measured plan keeps."
            raise InfeasibleBudget(msg, least_use=least)
        evaluations = tuple(
            make_evaluation(
                self.profile, a, scores[a.name], self.profile.selection_tokens, self.tables[MEMORY], shipped=a is winner
            )
            for a in assignments
        )
        made = make_plan(self.profile, winner, self.budget, self.tables, provenance())
        return replace(made, evaluations=evaluations, verdict=describe_choice(winner, assignments, scores))

    def _score(self, assignments: Sequence[Assignment]) -> Any:
        return score_cached(
            self.profile,
            {a.name: a.formats_by_weight(self.profile.candidates) for a in assignments},
            self.profile.selection_tokens,
            load_model=self.load_model,
            store=self.store,
            progress=self.progress,
        )

    def _approach_ceiling(self, best: Assignment, assignments: list[Assignment]) -> Any:
        ceiling = self.budget.max_kl
        assert ceiling is not None
        target = ceiling
        for attempt in range(2, self.rounds + 2):
            scores = self._score(assignments)
            measured = float(scores[best.name].kl.mean())
            if 0.95 * ceiling <= measured <= ceiling:
                break
            # Measured loss is close to proportional to the predicted one, so one ratio aims at the ceiling.
            target *= 0.98 * ceiling / measured
            best = find_assignment(self.profile, self.budget, self.tables, metric=best.metric, max_loss=target)
            best = replace(best, name=f"{best.metric}, round {attempt}")
            assignments = [*assignments, best]
        scores = self._score(assignments)
        return assignments, scores, choose_best(assignments, scores, self.tables[MEMORY], self.budget)


def _model_loader(model: str | Model | SensitivityProfile) -> Callable[[], Any]:
    def load_model() -> Any:
        if isinstance(model, SensitivityProfile):
            msg = "a plan must be verified with its model: got a profile alone. Pass the model, or verify=False."
            raise ValueError(msg)
        return (model if isinstance(model, Model) else Model(model)).reference.model

    return load_model


def _latency(profile: SensitivityProfile, budget: Budget, progress: Progress) -> CostTable | None:
    if LATENCY not in budget.limits:
        return None
    return measure_latency(
        profile.candidates,
        expert_share=profile.expert_share,
        progress=lambda done, total: progress("latency", done, total),
    )


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


def _read_tokens(reference: ReferenceModel, text: str, sequences: int | None, sequence_tokens: int) -> np.ndarray:
    documents = read_documents(text)
    count = sequences
    if count is None:
        total = sum(len(reference.tokenizer(d, add_special_tokens=False).input_ids) for d in documents)
        count = max(2, min(32, total // sequence_tokens))
    taken = tokenize_documents(
        documents, reference.tokenizer, sequences=count, sequence_tokens=sequence_tokens, source=text
    )
    return taken.tokens.numpy()
