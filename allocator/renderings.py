"""How a profile's or a plan's candidates were rendered, so that what follows renders them the same.

A quantizer that reads input statistics renders what these say; they belong to the profile, and are kept in the store or
collected again from the profile's calibration text.
"""

from typing import Any

import torch

from allocator.plans import Plan
from allocator.store import Store
from runtime.quantizers import STATISTICAL
from runtime.rendering import RenderingRule
from sensitivity.profile import SensitivityProfile
from sensitivity.weight_inputs import find_rendering


def rendering_of(profile: SensitivityProfile, model: Any, store: Store) -> RenderingRule:
    """Returns the rule that a profile's candidates were rendered with.

    Args:
        profile: The profile.
        model: Its reference model.
        store: Where the input statistics are; those of its calibration text are collected again if they are gone.
    """
    tokens, directory = torch.from_numpy(profile.calibration_tokens), store.rendering(profile.fingerprint)
    return find_rendering(model, profile.provenance["quantizer"], tokens, directory=directory)


def rendering_of_plan(plan: Plan, model: Any, store: Store) -> RenderingRule:
    """Returns the rule that a plan's candidates were rendered with.

    Args:
        plan: The plan.
        model: The reference model it was made for.
        store: Where its input statistics are, or its profile, from which they are collected again.

    Raises:
        ValueError: If the quantizer needs statistics, and neither they nor the profile are stored.
    """
    fingerprint = plan.provenance["profile"]
    profile = store.find_profile(fingerprint) if needs_statistics(plan) else None
    tokens = None if profile is None else torch.from_numpy(profile.calibration_tokens)
    return find_rendering(model, plan.provenance["quantizer"], tokens, directory=store.rendering(fingerprint))


def needs_statistics(made: Plan | SensitivityProfile) -> bool:
    """Returns whether a plan's or profile's quantizer reads input statistics."""
    return made.provenance["quantizer"] in STATISTICAL
