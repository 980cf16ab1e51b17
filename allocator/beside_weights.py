"""What is measured beside the weights: caches and activations, each added to a profile, under another fingerprint."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from allocator.progress import Progress
from allocator.store import Store
from runtime.activation_units import list_activation_candidates
from runtime.cache_units import find_cache_units, list_cache_candidates
from runtime.candidates import Candidates
from runtime.loading import ReferenceModel
from runtime.units import Unit
from sensitivity.activation_losses import ACTIVATION_SEQUENCES, activation_fingerprint, measure_activation_losses
from sensitivity.cache_losses import (
    CACHE_SEQUENCES,
    cache_fingerprint,
    check_metrics_beside_weights,
    measure_cache_losses,
)
from sensitivity.measure_config import MeasurementText
from sensitivity.profile import SensitivityProfile


def find_cache_candidates(
    reference: ReferenceModel, cache_formats: Sequence[str], metrics: Sequence[str]
) -> Candidates | None:
    """Returns the cache units and their allowed formats, or None where a request names none.

    Raises:
        ValueError: If a format is unknown or fits no cache, the model caches in another way or is read block by block,
            or no metric of the request is in the unit that the losses of caches have.
    """
    if not cache_formats:
        return None
    if reference.stored_weights is not None:
        msg = (
            "caches of a model that is read block by block cannot be measured: each pair of cache and format would "
            f"read the model once. Leave the cache formats out: got {', '.join(cache_formats)}."
        )
        raise ValueError(msg)
    check_metrics_beside_weights(metrics, "caches")
    return list_cache_candidates(find_cache_units(reference.model), cache_formats)


def add_cache(
    reference: ReferenceModel,
    weights: SensitivityProfile,
    cache: Candidates,
    text: MeasurementText,
    store: Store,
    progress: Progress,
) -> SensitivityProfile:
    """Returns the profile of the weights with the caches beside them, under a fingerprint of its own."""
    fingerprint = cache_fingerprint(weights.fingerprint, cache)
    measure = partial(
        measure_cache_losses,
        reference.model,
        cache,
        # Those of the single-unit KL are too short to have a past.
        text.fisher.tokens[:CACHE_SEQUENCES],
        pieces=store.pieces(fingerprint),
        progress=partial(progress, "cache"),
    )
    return _add("cache", weights, measure, fingerprint, store)


def find_activation_candidates(
    reference: ReferenceModel, units: Sequence[Unit], formats: Sequence[str], metrics: Sequence[str]
) -> Candidates | None:
    """Returns the activation units of units of weights with their formats, or None where no formats are named.

    Raises:
        ValueError: If a format is unknown, the model has no linear layers or is read block by block, or no metric is in
            the unit that the losses of activations have.
    """
    if not formats:
        return None
    if reference.stored_weights is not None:
        msg = (
            "activations of a model that is read block by block cannot be measured: a pass needs all of it. Leave the "
            f"activation formats out: got {', '.join(formats)}."
        )
        raise ValueError(msg)
    check_metrics_beside_weights(metrics, "activations")
    return list_activation_candidates(units, formats)


def add_activations(
    reference: ReferenceModel,
    measured: SensitivityProfile,
    activations: Candidates,
    seed: int,
    text: MeasurementText,
    store: Store,
    progress: Progress,
) -> SensitivityProfile:
    """Returns the profile with the activations beside what it has, under a fingerprint of its own."""
    fingerprint = activation_fingerprint(measured.fingerprint, activations)
    measure = partial(
        measure_activation_losses,
        reference.model,
        activations,
        text.fisher.tokens[:ACTIVATION_SEQUENCES],
        seed=seed,
        pieces=store.pieces(fingerprint),
        progress=partial(progress, "activations"),
    )
    return _add("activations", measured, measure, fingerprint, store)


def _add(
    part: str, measured: SensitivityProfile, measure: Callable[[], Any], fingerprint: str, store: Store
) -> SensitivityProfile:
    """Returns the kept profile of a fingerprint, or that of what was measured with one part more."""
    profile = store.find_profile(fingerprint)
    if profile is None:
        provenance = {**measured.provenance, "profile": fingerprint}
        profile = replace(measured, **{part: measure()}, provenance=provenance)
        store.save_profile(profile)
    return profile
