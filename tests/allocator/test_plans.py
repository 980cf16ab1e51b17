"""Plans: the packed file's header holds their numbers."""

import json
from dataclasses import replace

import pytest

from allocator.budget import Budget
from allocator.plan_query import plan as make
from allocator.plans import Plan
from runtime.checkpoint import _PROVENANCE_BYTES
from sensitivity.profile import SensitivityProfile


@pytest.fixture(scope="module")
def plan(tiny_profile: SensitivityProfile) -> Plan:
    return make(tiny_profile, Budget(bits_per_weight=4.5), verify=False)


def test_header_holds_the_numbers(plan: Plan) -> None:
    header = json.loads(plan.header_metadata()["bitplan.plan"])
    assert header["objective"] == plan.objective
    assert header["lower_bound"] == plan.lower_bound
    assert header["corrected_kl"] == plan.corrected_kl
    assert header["memory_bytes"] == plan.memory_bytes
    assert header["provenance"] == plan.provenance
    assert not {"weights", "units", "evaluations"} & set(header)


@pytest.mark.parametrize("character", ["x", '"', "é", "𝄞", "\0"])
def test_header_keeps_its_reserve_whatever_the_texts(plan: Plan, character: str) -> None:
    long = character * 5000
    crowded = replace(
        plan,
        budget=long,
        verdict=long,
        solver=long,
        provenance={**dict.fromkeys(plan.provenance, long), "model_fingerprint": "f" * 64},
    )
    metadata = crowded.header_metadata()
    # The whole metadata as the file holds it, besides the formats: their reserve is their own.
    assert len(json.dumps({"format": "pt", **metadata, "bitplan.formats": ""})) <= _PROVENANCE_BYTES - 1024
    assert json.loads(metadata["bitplan.plan"])["objective"] == plan.objective
