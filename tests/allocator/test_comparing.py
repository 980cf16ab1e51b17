"""Comparisons of real plans: parts recomputed from them, measurements on one text, what cannot be compared."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import allocator
from allocator.artefact_match import ArtefactMismatch
from allocator.budget import Budget
from allocator.comparing import compare
from allocator.plans import CachePlan, Plan
from allocator.store import Store
from sensitivity.profile import SensitivityProfile


@pytest.fixture(scope="module")
def plans(tiny_profile: SensitivityProfile) -> tuple[Plan, Plan]:
    found = [allocator.plan(tiny_profile, Budget(bits_per_weight=bits), verify=False) for bits in (4.5, 6)]
    return found[0], found[1]


def test_parts_are_those_of_the_plans(plans: tuple[Plan, Plan], tiny_store: Store, tmp_path: Path) -> None:
    page = compare(*plans, tmp_path, names=("small", "large"), store=tiny_store)
    units = pd.read_csv(tmp_path / "units.csv")
    for key, plan in zip(("first", "second"), plans, strict=True):
        assert list(units["unit"]) == [unit.unit for unit in plan.units]
        assert list(units[f"{key}_format"]) == [unit.format for unit in plan.units]
        assert list(units[f"{key}_bytes"]) == [unit.memory_bytes for unit in plan.units]
        assert units[f"{key}_loss"].sum() == pytest.approx(plan.predicted_kl)
    text = page.read_text(encoding="utf-8")
    assert "large loses" in text and "(predicted)" in text
    assert "not measured on one text" in text


def test_with_the_model_both_are_measured(
    plans: tuple[Plan, Plan], tiny_llama_dir: Path, tiny_store: Store, tmp_path: Path
) -> None:
    page = compare(*plans, tmp_path, model=str(tiny_llama_dir), store=tiny_store)
    text = page.read_text(encoding="utf-8")
    assert "Both were measured on evaluation text" in text
    for plan in plans:
        shipped = next(e for e in allocator.evaluate(str(tiny_llama_dir), plan, store=tiny_store) if e.shipped)
        assert f"{shipped.kl:.3g}"[:5] in text


def test_plans_of_an_engine_are_read_on_the_measured_units(
    plans: tuple[Plan, Plan], tiny_profile: SensitivityProfile, tiny_store: Store, tmp_path: Path
) -> None:
    """GPTQModel fuses projections: its plan has fewer units than the one beside it."""
    fused = allocator.plan(tiny_profile, Budget(bits_per_weight=9), verify=False, engine="gptqmodel")
    assert len(fused.units) < len(plans[0].units)
    page = compare(plans[0], fused, tmp_path, names=("free", "fused"), store=tiny_store)
    units = pd.read_csv(tmp_path / "units.csv")
    assert len(units) == len(plans[0].units)
    assert units["second_loss"].sum() == pytest.approx(fused.predicted_kl)
    assert "fused keeps the rules of gptqmodel" in page.read_text(encoding="utf-8")


def test_plans_of_two_models_are_refused(plans: tuple[Plan, Plan], tiny_store: Store, tmp_path: Path) -> None:
    other = replace(plans[1], provenance={**plans[1].provenance, "model_fingerprint": "0" * 64})
    with pytest.raises(
        ArtefactMismatch, match=r"must be of one model: got one of '.*' \(.{12}\) and one of .*\(0{12}\)"
    ):
        compare(plans[0], other, tmp_path, store=tiny_store)


def test_plans_with_a_cache_are_refused(plans: tuple[Plan, Plan], tiny_store: Store, tmp_path: Path) -> None:
    cache = CachePlan(context=8, batch=1, memory_bytes=1, formats={})
    with pytest.raises(ValueError, match="must be of weights alone: got one with formats of a cache or of activations"):
        compare(plans[0], replace(plans[1], cache=cache), tmp_path, store=tiny_store)


def test_without_a_stored_profile_the_message_says_so(plans: tuple[Plan, Plan], tmp_path: Path) -> None:
    with pytest.raises(ArtefactMismatch, match=r"must fit one stored profile: got '.{16}' is not in '.*'. Measure"):
        compare(*plans, tmp_path / "out", store=Store(tmp_path / "empty"))


def test_formats_that_no_profile_knows_are_named(plans: tuple[Plan, Plan], tiny_store: Store, tmp_path: Path) -> None:
    foreign = replace(plans[1], weights=dict.fromkeys(plans[1].weights, "int7_g64"))
    with pytest.raises(ArtefactMismatch, match=r"must fit one stored profile: got .*int7_g64"):
        compare(plans[0], foreign, tmp_path, store=tiny_store)


def test_names_must_differ(plans: tuple[Plan, Plan], tiny_store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names of their own: got 'x' twice"):
        compare(*plans, tmp_path / "out", names=("x", "x"), store=tiny_store)
    assert not (tmp_path / "out").exists()
