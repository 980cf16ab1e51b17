"""Reference models rewritten by transforms: when they are measured, and again whenever a profile or plan is used.

What a transform found (scales, bases) depends on how a machine rounds, so it is kept in the store and folded again from
there. Where it is gone it is found again from the profile's calibration text; its hash, which profiles and plans carry,
says whether the weights are the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from allocator.artefact_match import ArtefactMismatch
from allocator.plans import Plan
from allocator.store import Store
from runtime.checkpoint import rest_bytes
from runtime.loading import ReferenceModel
from runtime.transforms import NamedTransform, apply_transforms_, fingerprint_transforms, parse_transform
from runtime.transforms.record import TransformRecord
from runtime.units import list_weights
from sensitivity.profile import SensitivityProfile, fingerprint_of

TRANSFORMS, TRANSFORMS_RECIPE, TRANSFORMS_CONTENT = "transforms", "transforms_recipe", "transforms_content"
# Raised whenever a transform would find other tensors on the same text.
TRANSFORM_VERSION = 1
_SEQUENCES = 32  # of the calibration text; largest values and second moments settle early


def transform_(
    reference: ReferenceModel, names: Sequence[str], calibration_tokens: Tensor, store: Store
) -> ReferenceModel:
    """Rewrites a reference model in place, and returns it with the record of it.

    Args:
        reference: The model as it was trained.
        names: Transforms with their options, in order.
        calibration_tokens: [S, T] int64.
        store: Where what they find is kept, and found again.

    Raises:
        ValueError: If a name is unknown, or the model is none that the transforms know.
    """
    transforms = [parse_transform(name) for name in names]
    recipe = fingerprint_of(
        {
            "version": TRANSFORM_VERSION,
            "model": reference.fingerprint,
            "transforms": [transform.text for transform in transforms],
            "calibration": calibration_tokens[:_SEQUENCES].tolist(),
        }
    )
    kept = _find_tensors(recipe, store)
    transformed, tensors = _apply_(reference, transforms, recipe, calibration_tokens, kept)
    if kept is None:
        store.save_transforms(recipe, {name: tensor.numpy() for name, tensor in tensors.items()})
    return transformed


def transform_again_(reference: ReferenceModel, made: Plan | SensitivityProfile, store: Store) -> ReferenceModel:
    """Rewrites a reference model in place as it was for a plan or profile, and returns it; untouched where it was not.

    Args:
        reference: The model as it was trained.
        made: The plan or profile.
        store: Where what the transforms found is kept, or the profile.

    Raises:
        ValueError: If neither of them is stored.
        ArtefactMismatch: If what is stored, or was found again, is not what the plan or profile was made under.
    """
    if not is_transformed(made):
        return reference
    recipe = made.provenance[TRANSFORMS_RECIPE]
    transforms = [parse_transform(name) for name in made.provenance[TRANSFORMS].split(",")]
    kept = _find_tensors(recipe, store)
    profile = made if isinstance(made, SensitivityProfile) else store.find_profile(made.provenance["profile"])
    if kept is not None:
        _check_content(made, transforms, kept, store)
    elif profile is None:
        msg = (
            f"what the transforms '{made.provenance[TRANSFORMS]}' found must be kept, or the profile with its "
            f"calibration text: got neither '{recipe[:16]}' nor the profile in '{store.root}'. Measure again with the "
            "same settings."
        )
        raise ValueError(msg)
    tokens = None if profile is None else torch.from_numpy(profile.calibration_tokens)
    transformed, tensors = _apply_(reference, transforms, recipe, tokens, kept)
    _check_content(made, transforms, tensors, store)
    return transformed


def is_transformed(made: Plan | SensitivityProfile) -> bool:
    """Returns whether a plan or profile was made under transforms."""
    return TRANSFORMS in made.provenance


def _find_tensors(recipe: str, store: Store) -> dict[str, Tensor] | None:
    kept = store.find_transforms(recipe)
    return None if kept is None else {name: torch.from_numpy(array) for name, array in kept.items()}


def _check_content(
    made: Plan | SensitivityProfile, transforms: Sequence[NamedTransform], tensors: Mapping[str, Tensor], store: Store
) -> None:
    content = fingerprint_transforms(transforms, tensors)
    if content != made.provenance[TRANSFORMS_CONTENT]:
        msg = (
            "a plan or profile must be used with the transforms it was made under: got "
            f"'{made.provenance[TRANSFORMS]}' of {made.provenance[TRANSFORMS_CONTENT][:12]}, and tensors of "
            f"{content[:12]} in '{store.root}'. Measure again with the same settings, and plan from that."
        )
        raise ArtefactMismatch(msg)


def _apply_(
    reference: ReferenceModel,
    transforms: Sequence[NamedTransform],
    recipe: str,
    tokens: Tensor | None,
    known: Mapping[str, Tensor] | None,
) -> tuple[ReferenceModel, dict[str, Tensor]]:
    if reference.stored_weights is not None:
        msg = (
            "transforms rewrite all weights in memory: got "
            f"'{', '.join(transform.text for transform in transforms)}' for '{reference.name}', which is read block by "
            "block. Leave out --low-memory, or the transforms."
        )
        raise ValueError(msg)
    model, reference_bytes = reference.model, reference.reference_bytes
    weights = sum(weight.weight_count for weight in list_weights(model).values())
    bits = 8.0 * (reference_bytes - rest_bytes(model)) / weights
    tensors = apply_transforms_(model, transforms, None if tokens is None else tokens[:_SEQUENCES], known=known)
    record = TransformRecord(
        names=tuple(transform.text for transform in transforms),
        recipe=recipe,
        content=fingerprint_transforms(transforms, tensors),
        added_weights=sum(weight.weight_count for weight in list_weights(model).values()) - weights,
        reference_bytes=reference_bytes,
        reference_bits_per_weight=bits,
    )
    return replace(reference, transforms=record), tensors
