"""How far a recipe is from the best plan of the same bytes: one made by hand, or by another tool."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig

from allocator.artefact_match import check_same_profile
from allocator.artefacts import Model, find_profile, open_model, provenance
from allocator.assignments import Assignment, use_of
from allocator.budget import MEMORY, Budget, InfeasibleBudget
from allocator.plan_query import plan
from allocator.planning import default_metric, make_plan
from allocator.plans import Plan
from allocator.problems import build_cost_tables
from allocator.progress import Progress, silent
from allocator.store import Store
from runtime.candidates import Candidates, NoLegalFormat
from runtime.exporters.gguf_blocks import gguf_type
from runtime.formats import find_format
from runtime.recipes import ENGINE_OF, read_recipe
from sensitivity.profile import SensitivityProfile

RECIPE = "recipe"


@dataclass(frozen=True, kw_only=True)
class Priced:
    """A recipe beside the best plans of its bytes.

    Args:
        kind: Kind of the recipe, as in ``runtime.recipes``.
        recipe: The recipe as a plan; its lower bound is that of the best one without rules.
        best: The best plan of no more bytes.
        best_legal: The best one that the recipe's own engine can load; None where there is none of these bytes.
    """

    kind: str
    recipe: Plan
    best: Plan
    best_legal: Plan | None

    def describe(self) -> str:
        """Returns the comparison as text."""
        rows = {"recipe": self.recipe, "best plan": self.best, f"best for {ENGINE_OF[self.kind]}": self.best_legal}
        lines = [
            f"{name}: none of these bytes"
            if made is None
            else f"{name}: predicted KL {made.predicted_kl:.4g} nats per token in {made.memory_bytes / 2**20:.2f} MiB"
            for name, made in rows.items()
        ]
        share = self.recipe.predicted_kl / self.best.predicted_kl if self.best.predicted_kl > 0 else 1.0
        return "\n".join([*lines, f"the recipe loses {share:.3g} times what the best plan of its bytes loses"])


def price(
    model: str | Model,
    recipe: Path,
    *,
    metric: str | None = None,
    profile: SensitivityProfile | None = None,
    store: Store | None = None,
    progress: Progress = silent,
) -> Priced:
    """Returns a recipe's predicted loss and bytes, beside the best plans of no more bytes.

    Args:
        model: The model the recipe is for.
        recipe: The file.
        metric: Metric that predicts; None for the best one held.
        profile: Profile to use instead of the model's latest.
        store: Where profiles are kept.
        progress: Called with (stage, done, total).

    Raises:
        ArtefactMismatch: If the profile was measured on another model.
        ValueError: If the recipe cannot be read, or asks for what the profile has not measured.
    """
    model, store = open_model(model), store or Store()
    if profile is not None:
        check_same_profile(profile.provenance["model_fingerprint"], model.fingerprint, model.source)
    profile = profile or find_profile(model, store=store, progress=progress)
    weights = {weight.name: weight for unit in profile.candidates.units for weight in unit.weights}
    config = AutoConfig.from_pretrained(model.path) if model.path.is_dir() else model.reference.model.config
    kind, formats = read_recipe(recipe, weights, config)
    chosen = metric or default_metric(profile)
    choice = _find_choice(profile, formats)
    tables = build_cost_tables(profile)
    budget = Budget(memory_bytes=round(use_of(choice, {MEMORY: tables[MEMORY]})[MEMORY]))
    best = plan(profile, budget, verify=False, metric=chosen, store=store)
    try:
        best_legal = plan(profile, budget, verify=False, metric=chosen, engine=ENGINE_OF[kind], store=store)
    except (InfeasibleBudget, NoLegalFormat):
        best_legal = None
    assignment = Assignment(name=f"{RECIPE} {recipe.name}", kind="plan", metric=chosen, choice=choice)
    made = make_plan(profile, assignment, budget, tables, provenance())
    gap = (made.objective - best.lower_bound) / made.objective if made.objective > 0 else 0.0
    made = replace(
        made, termination=RECIPE, lower_bound=best.lower_bound, relative_gap=gap, verdict=f"Read from {recipe.name}."
    )
    return Priced(kind=kind, recipe=made, best=best, best_legal=best_legal)


def _find_choice(profile: SensitivityProfile, formats: dict[str, str]) -> NDArray[np.int64]:
    """Returns the recipe as format indices [U].

    Raises:
        ValueError: If it splits a unit, or asks for a pair that is no candidate.
    """
    candidates = profile.candidates
    choice = []
    for u, unit in enumerate(candidates.units):
        names = sorted({formats[weight.name] for weight in unit.weights})
        if len(names) > 1:
            msg = (
                f"a recipe must give all weights of a unit one format: got {', '.join(names)} for '{unit.name}'. "
                "Measure with finer units."
            )
            raise ValueError(msg)
        f = _held_format(candidates, names[0])
        if f is None or not candidates.allowed[u, f]:
            why = "not measured" if f is None else candidates.reasons.get((u, f), "not allowed")
            msg = (
                f"a recipe's formats must have been measured: got '{names[0]}' for '{unit.name}' ({why}). Measure with "
                f"--formats {','.join(sorted(set(formats.values())))}."
            )
            raise ValueError(msg)
        choice.append(f)
    return np.array(choice, dtype=np.int64)


def _held_format(candidates: Candidates, name: str) -> int | None:
    """Returns the index of a format among the candidates, or of one that llama.cpp stores as the same type."""
    type_name = gguf_type(find_format(name))
    for same in (lambda f: f.name == name, lambda f: type_name is not None and gguf_type(f) == type_name):
        found = [i for i, format_ in enumerate(candidates.formats) if same(format_)]
        if found:
            return found[0]
    return None
