"""Two plans of one model side by side: their parts on the units of one profile, measured on the same text where asked.

Both are read on the axes of one profile, so that bytes and losses of a part mean the same for both, whatever metric,
engine or granularity each was made with.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from allocator.artefact_match import ArtefactMismatch
from allocator.artefacts import Model, assignment_of_plan, open_model
from allocator.assignments import Assignment, pick
from allocator.budget import MEMORY
from allocator.frontiers import frontier
from allocator.pipeline import evaluate
from allocator.planning import predicting_metric
from allocator.plans import Evaluation, Plan
from allocator.problems import build_cost_tables
from allocator.progress import Progress, silent
from allocator.store import Store
from reports.comparison import Comparison, Side
from sensitivity.profile import NATS, SensitivityProfile


def compare(
    first: Plan,
    second: Plan,
    out: Path,
    *,
    names: tuple[str, str] = ("first", "second"),
    model: str | Model | None = None,
    text: str | None = None,
    store: Store | None = None,
    progress: Progress = silent,
) -> Path:
    """Writes the comparison of two plans of one model, ``comparison.html`` and CSV files; returns the page's path.

    Args:
        first: A plan.
        second: Another plan of the same model.
        out: Directory of the files.
        names: What the page calls them.
        model: The model, to measure both on evaluation text; None for the measurements that both plans carry.
        text: Evaluation text; None for the profile's own.
        store: Where profiles and scores are kept.
        progress: Called with (stage, done, total).

    Raises:
        ArtefactMismatch: If they are plans of two models, or fit no profile in common.
        ValueError: If neither's profile is stored, one of them alone has a cache, or the names are the same.
    """
    from reports.comparison_page import write_comparison

    store = store or Store()
    _check_comparable(first, second)
    profile, assignments = _common_profile(first, second, store)
    measured, measured_on = _measurements(first, second, model, text, store, progress)
    metric = predicting_metric(profile, first.metric)
    parts = _parts(profile, assignments, metric)
    sides = [
        _side(name, plan, evaluation, float(parts[f"{key}_loss"].sum()) if _is_kl(profile, metric) else None)
        for name, plan, evaluation, key in zip(names, (first, second), measured, ("first", "second"), strict=True)
    ]
    comparison = Comparison(
        title=f"{names[0]} beside {names[1]}",
        model_name=first.provenance["model"],
        first=sides[0],
        second=sides[1],
        parts=parts,
        loss_unit=profile.table(metric).unit_of_measure,
        frontier=pd.DataFrame(frontier(profile, metric=metric, store=store)),
        measured_on=measured_on,
        notes=_notes(first, second, names, metric),
    )
    return write_comparison(comparison, out)


def _is_kl(profile: SensitivityProfile, metric: str) -> bool:
    return profile.table(metric).unit_of_measure == NATS


def _check_comparable(first: Plan, second: Plan) -> None:
    models = [plan.provenance["model_fingerprint"] for plan in (first, second)]
    if models[0] != models[1]:
        msg = (
            f"plans that are compared must be of one model: got one of '{first.provenance['model']}' "
            f"({models[0][:12]}) and one of '{second.provenance['model']}' ({models[1][:12]}). Take two of one."
        )
        raise ArtefactMismatch(msg)
    if any(plan.cache is not None or plan.activations is not None for plan in (first, second)):
        msg = (
            "plans that are compared must be of weights alone: got one with formats of a cache or of activations. Plan "
            "without them."
        )
        raise ValueError(msg)


def _common_profile(
    first: Plan, second: Plan, store: Store
) -> tuple[SensitivityProfile, tuple[Assignment, Assignment]]:
    """Returns the first profile of the two plans that knows the units and formats of both."""
    problems: list[str] = []
    for fingerprint in dict.fromkeys(plan.provenance["profile"] for plan in (first, second)):
        profile = store.find_profile(fingerprint)
        if profile is None:
            problems.append(f"'{fingerprint[:16]}' is not in '{store.root}'")
            continue
        try:
            return profile, (assignment_of_plan(profile, first), assignment_of_plan(profile, second))
        except (ArtefactMismatch, ValueError) as error:
            problems.append(str(error))
    msg = (
        "plans that are compared must fit one stored profile: got " + "; ".join(problems) + ". Measure the model with "
        "the formats of both, and plan again."
    )
    raise ArtefactMismatch(msg)


def _measurements(
    first: Plan, second: Plan, model: str | Model | None, text: str | None, store: Store, progress: Progress
) -> tuple[Sequence[Evaluation | None], str | None]:
    """Returns the measurements of both on one text, and its name; none where they were measured on different ones."""
    if model is not None:
        opened = open_model(model)
        found = [evaluate(opened, plan, text=text, store=store, progress=progress) for plan in (first, second)]
        shipped = [next(e for e in evaluations if e.shipped) for evaluations in found]
        return shipped, "evaluation text that nothing else saw" if text is None else f"'{text}'"
    carried = [plan.shipped for plan in (first, second)]
    texts = {plan.provenance.get("selection") for plan in (first, second)}
    if None in carried or len(texts) != 1 or None in texts:
        return [None, None], None
    return carried, "the selection text that chose between plans"


def _parts(profile: SensitivityProfile, assignments: tuple[Assignment, Assignment], metric: str) -> pd.DataFrame:
    units, memory, loss = profile.candidates.units, build_cost_tables(profile)[MEMORY].cost, profile.table(metric).loss
    table = pd.DataFrame(
        {
            "unit": [unit.name for unit in units],
            "role": [unit.role for unit in units],
            "layer_index": pd.array([unit.layer_index for unit in units], dtype="Int64"),
            "expert_index": pd.array([unit.expert_index for unit in units], dtype="Int64"),
        }
    )
    weights = np.array([unit.weight_count for unit in units])
    for key, assignment in zip(("first", "second"), assignments, strict=True):
        stored = pick(memory, assignment.choice)
        table[f"{key}_format"] = [profile.candidates.formats[f].name for f in assignment.choice]
        table[f"{key}_bits"] = 8 * stored / weights
        table[f"{key}_bytes"] = stored
        table[f"{key}_loss"] = pick(loss, assignment.choice)
    return table


def _side(name: str, plan: Plan, evaluation: Evaluation | None, predicted_kl: float | None) -> Side:
    return Side(
        name=name,
        budget_text=plan.budget,
        memory_bytes=plan.memory_bytes,
        bits_per_weight=plan.bits_per_weight,
        predicted_kl=predicted_kl,
        measured_kl=None if evaluation is None else evaluation.kl,
        measured_kl_low=None if evaluation is None else evaluation.kl_low,
        measured_kl_high=None if evaluation is None else evaluation.kl_high,
    )


def _notes(first: Plan, second: Plan, names: tuple[str, str], metric: str) -> tuple[str, ...]:
    notes = [f"Losses of parts and predictions are by the metric '{metric}', for both plans."]
    for name, plan in zip(names, (first, second), strict=True):
        if plan.rules is not None:
            notes.append(f"{name} keeps the rules of {plan.rules.engine}; its size is that of the engine's file.")
    return tuple(notes)
