"""Assignments: uniform rules, embeddings included, and what an assignment uses."""

import numpy as np
import pytest
from numpy.typing import NDArray

from allocator.assignments import Assignment, bits_per_weight, list_uniform, pick, use_of
from runtime.candidates import Candidates, list_candidates
from runtime.costs import CostTable
from runtime.units import find_units
from sensitivity.profile import SensitivityProfile
from tests.tiny_models import build_tiny_llama

FORMATS = ("int2_g64", "int4_g64", "int8_g64", "bf16")


@pytest.fixture(scope="module")
def candidates() -> Candidates:
    return list_candidates(find_units(build_tiny_llama()), FORMATS)


def names_by_kind(candidates: Candidates, assignment: Assignment) -> dict[bool, set[str]]:
    """Returns whether a unit is an embedding or head -> names of its formats."""
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for unit, f in zip(candidates.units, assignment.choice, strict=True):
        found[unit.kind in ("embedding", "head")].add(candidates.formats[int(f)].name)
    return found


@pytest.mark.parametrize(
    ("name", "embeddings", "others"),
    [
        # Embeddings may not take 2 bits; the smallest wider format is 4 bits.
        ("uniform int2_g64", "int4_g64", "int2_g64"),
        ("uniform int2_g64, 8-bit embeddings", "int8_g64", "int2_g64"),
        ("uniform int4_g64", "int4_g64", "int4_g64"),
        ("uniform int4_g64, 8-bit embeddings", "int8_g64", "int4_g64"),
        ("uniform int8_g64", "int8_g64", "int8_g64"),
        ("uniform bf16", "bf16", "bf16"),
    ],
)
def test_uniform_rules(name: str, embeddings: str, others: str, candidates: Candidates) -> None:
    found = {a.name: a for a in list_uniform(candidates, "fisher")}
    assert names_by_kind(candidates, found[name]) == {True: {embeddings}, False: {others}}
    assert len(found) == 6
    assert {(a.kind, a.metric, a.result) for a in found.values()} == {("uniform", "fisher", None)}


def test_same_choice_is_listed_once() -> None:
    candidates = list_candidates(find_units(build_tiny_llama()), ("int4_g64",))
    assert [a.name for a in list_uniform(candidates, "fisher")] == ["uniform int4_g64"]


def test_widest_stands_in_where_nothing_is_wide_enough() -> None:
    pinned = list_candidates(find_units(build_tiny_llama()), FORMATS, pins={"q_proj": "int2_g64"})
    [assignment] = [a for a in list_uniform(pinned, "fisher") if a.name == "uniform int8_g64"]
    formats = assignment.formats_by_weight(pinned)
    assert {f for name, f in formats.items() if "q_proj" in name} == {"int2_g64"}
    assert {f for name, f in formats.items() if "o_proj" in name} == {"int8_g64"}


def test_every_weight_has_the_format_of_its_unit(candidates: Candidates) -> None:
    choice = np.array([int(np.flatnonzero(row)[u % row.sum()]) for u, row in enumerate(candidates.allowed)])
    assignment = Assignment(name="a", kind="plan", metric="fisher", choice=choice)
    formats = assignment.formats_by_weight(candidates)
    expected = {w.name: FORMATS[f] for unit, f in zip(candidates.units, choice, strict=True) for w in unit.weights}
    assert formats == expected


def table(cost: NDArray[np.float64], fixed: float) -> CostTable:
    return CostTable(resource="memory_bytes", cost=cost, fixed=fixed, unit_of_measure="bytes", source="exact")


def test_use_is_the_chosen_costs_and_the_fixed_one() -> None:
    cost = np.array([[1.0, 2.0], [np.nan, 8.0]])
    choice = np.array([0, 1])
    np.testing.assert_array_equal(pick(cost, choice), [1.0, 8.0])
    assert use_of(choice, {"memory_bytes": table(cost, 100.0)}) == {"memory_bytes": 109.0}


def test_bits_per_weight_counts_the_units_alone(tiny_profile: SensitivityProfile) -> None:
    weights = sum(unit.weight_count for unit in tiny_profile.candidates.units)
    assert bits_per_weight(tiny_profile, tiny_profile.fixed_bytes + weights / 2) == 4.0
