"""Plans and profiles know their model."""

import pytest

from allocator.artefact_match import ArtefactMismatch, check_same_model, check_same_profile
from allocator.budget import Budget
from allocator.plan_query import plan as make
from sensitivity.profile import SensitivityProfile


def test_plan_for_another_model(tiny_profile: SensitivityProfile) -> None:
    plan = make(tiny_profile, Budget(bits_per_weight=4.5), verify=False)
    check_same_model(plan, plan.provenance["model_fingerprint"], "itself")
    with pytest.raises(ArtefactMismatch, match=r"made for: got a plan for '.*' \(.{12}\) and the model 'other' \(0000"):
        check_same_model(plan, "0" * 64, "other")


def test_profile_of_another_model() -> None:
    check_same_profile("1" * 64, "1" * 64, "itself")
    with pytest.raises(ArtefactMismatch, match=r"measured on: got one of 111111111111 and the model 'other' \(0000"):
        check_same_profile("1" * 64, "0" * 64, "other")
