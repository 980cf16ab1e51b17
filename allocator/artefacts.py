"""What belongs together: a model and its files, its profile, a plan and the profile and versions it was made with."""

import platform
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np

from allocator.artefact_match import ArtefactMismatch
from allocator.assignments import Assignment
from allocator.measuring import MeasureRequest, run_measurement
from allocator.planning import UNIFORM_RULE
from allocator.plans import Plan
from allocator.progress import Progress, silent
from allocator.store import Store
from allocator.transformed import TRANSFORMS, TRANSFORMS_CONTENT, is_transformed, transform_again_
from runtime.activation_names import activation_name
from runtime.loading import ReferenceModel, find_model, fingerprint_model, load_reference
from runtime.stored_weights import load_stored_reference
from runtime.units import list_weights
from sensitivity.activation_losses import join_activations
from sensitivity.cache_losses import join_cache
from sensitivity.profile import SensitivityProfile


class Model:
    """A model by name, found and fingerprinted at once, loaded when first needed.

    Args:
        source: A Hugging Face directory or id, or a GGUF file.
        low_memory: Whether its weights stay in its files and are read block by block: more time, less memory.
    """

    def __init__(self, source: str, *, low_memory: bool = False) -> None:
        self.source = source
        self.low_memory = low_memory
        self.path = find_model(source)
        self.fingerprint = fingerprint_model(self.path)
        # Of the transforms used last.
        self._rewritten: ReferenceModel | None = None

    @cached_property
    def reference(self) -> ReferenceModel:
        """The model in float32 with its tokenizer."""
        return self.load_again()

    def reference_of(self, made: Plan | SensitivityProfile, store: Store) -> ReferenceModel:
        """Returns the reference model that a plan or profile was made for: under its transforms, if it names any.

        Raises:
            ValueError: If what the transforms found is stored no more.
            ArtefactMismatch: If it is not what the plan or profile was made under.
        """
        if not is_transformed(made):
            return self.reference
        held = self._rewritten
        if held is None or held.transforms is None or held.transforms.content != made.provenance[TRANSFORMS_CONTENT]:
            self._rewritten = held = None
            self._rewritten = held = transform_again_(self.load_again(), made, store)
        return held

    def load_again(self) -> ReferenceModel:
        """Returns a copy of its own, which may be packed."""
        return load_stored_reference(self.source) if self.low_memory else load_reference(self.source)


def open_model(model: str | Model) -> Model:
    """Returns a model by name, or the ``Model`` itself."""
    return model if isinstance(model, Model) else Model(model)


def find_profile(
    model: str | Model | SensitivityProfile, *, store: Store, progress: Progress = silent
) -> SensitivityProfile:
    """Returns the profile itself, a model's latest profile, or a new one measured with the defaults."""
    if isinstance(model, SensitivityProfile):
        return model
    model = open_model(model)
    return store.find_latest_profile(model.fingerprint) or run_measurement(
        model.reference, MeasureRequest(), store, progress
    )


def profile_of_plan(
    plan: Plan, model: Model, store: Store, progress: Progress, *, own: bool = True
) -> SensitivityProfile:
    """Returns the profile a plan was made from, with caches and activations among its units where the plan has them.

    Args:
        plan: The plan.
        model: Its model.
        store: Where profiles are kept.
        progress: Called with (stage, done, total).
        own: Whether it must be this one; otherwise the model's latest does when the store no longer has it.

    Raises:
        ValueError: If it must be this one and is not stored, or the latest one knows nothing of the plan's caches.
        ArtefactMismatch: If the model's latest was measured under other transforms than the plan was made under.
    """
    profile = store.find_profile(plan.provenance["profile"])
    if profile is None and own:
        # Another profile may have kept apart what this one was calibrated on.
        msg = (
            f"the profile a plan was made from must be stored, for its evaluation text: got none of "
            f"'{plan.provenance['profile'][:16]}' in '{store.root}'. Name a text that nothing else saw (--text)."
        )
        raise ValueError(msg)
    profile = profile or find_profile(model, store=store, progress=progress)
    if profile.provenance.get(TRANSFORMS_CONTENT) != plan.provenance.get(TRANSFORMS_CONTENT):
        msg = (
            "a plan must be used with a profile of the same transforms: got a plan under "
            f"'{plan.provenance.get(TRANSFORMS, 'none')}' and the profile '{profile.fingerprint[:16]}' under "
            f"'{profile.provenance.get(TRANSFORMS, 'none')}'. Measure again with the plan's transforms."
        )
        raise ArtefactMismatch(msg)
    if plan.cache is not None:
        profile = join_cache(profile, context=plan.cache.context, batch=plan.cache.batch)
    return profile if plan.activations is None else join_activations(profile)


def assignment_of_plan(profile: SensitivityProfile, plan: Plan) -> Assignment:
    """Returns the assignment that a plan stands for, on a profile's axes.

    Raises:
        ArtefactMismatch: If the plan's formats do not fit the profile's units.
        ValueError: If a format is not among the profile's candidates.
    """
    parts = [part.formats for part in (plan.cache, plan.activations) if part is not None]
    formats = dict(plan.weights)
    for part in parts:
        formats |= part
    names = [
        [weight.name for weight in unit.weights] or [activation_name(m) for m in unit.modules] or [unit.name]
        for unit in profile.candidates.units
    ]
    for unit, own in zip(profile.candidates.units, names, strict=True):
        if len({formats.get(name) for name in own} - {None}) != 1:
            msg = (
                f"a plan must give all weights of a unit one format: unit '{unit.name}' of the profile "
                f"'{profile.fingerprint[:16]}' has others in the plan '{plan.name}'. Plan again from this profile."
            )
            raise ArtefactMismatch(msg)
    choice = [profile.candidates.format_index(formats[own[0]]) for own in names]
    kind = "uniform" if plan.termination == UNIFORM_RULE else "plan"
    return Assignment(name=plan.name, kind=kind, metric=plan.metric, choice=np.array(choice, dtype=np.int64))


def plans_routers(model: Any, plan: Plan) -> bool:
    """Returns whether a plan has formats for a model's routers."""
    weights = list_weights(model, routers=True)
    return any(weights[name].kind == "router" for name in plan.weights if name in weights)


def provenance() -> dict[str, str]:
    """Returns the versions and the moment of a plan."""
    return {
        "bitplan": version("bitplan"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def model_to_measure(model: Model | SensitivityProfile, made: Plan | SensitivityProfile, store: Store) -> Any:
    """Returns the reference model that plans of a profile are measured on.

    Args:
        model: The model, or a profile where nothing need be measured.
        made: What was made from it: its plan or profile.
        store: Where the transforms of its profile are kept.

    Raises:
        ValueError: If there is only a profile.
    """
    if isinstance(model, SensitivityProfile):
        msg = "a plan must be verified with its model: got a profile alone. Pass the model, or verify=False."
        raise ValueError(msg)
    return model.reference_of(made, store).model
