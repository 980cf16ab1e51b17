"""Latency tables are measured once a device and set of candidates."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import allocator
from allocator.budget import Budget
from allocator.progress import silent
from allocator.store import Store
from allocator.timings import describe_latency, find_latency, find_modelled_latency
from sensitivity.measure_config import WEIGHT_ERROR
from sensitivity.profile import SensitivityProfile
from tests.tiny_measurements import CONFIG, keep_units, make_request


def test_latency_is_measured_once(tiny_profile: SensitivityProfile, tmp_path: Path) -> None:
    profile, store = keep_units(tiny_profile, 4), Store(tmp_path)
    stages: list[str] = []

    def progress(stage: str, done: int, total: int) -> None:
        stages.append(stage)

    first = find_latency(profile, store, progress)
    assert set(stages) == {"latency"}
    np.testing.assert_array_equal(np.isfinite(first.cost), profile.candidates.allowed)
    assert (first.cost[profile.candidates.allowed] > 0).all()
    stages.clear()
    again = find_latency(profile, store, progress)
    assert stages == []
    np.testing.assert_array_equal(again.cost, first.cost)
    assert (again.resource, again.fixed, again.unit_of_measure, again.source, again.device) == (
        first.resource,
        first.fixed,
        first.unit_of_measure,
        first.source,
        first.device,
    )
    find_latency(replace(profile, expert_share=0.5), store, progress)
    assert stages


def test_experts_count_by_the_measured_routing(tiny_mixtral_dir: Path, tiny_text: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, metrics=(WEIGHT_ERROR,))
    store = Store(tmp_path)
    profile = allocator.measure(str(tiny_mixtral_dir), request=make_request(tiny_text, config=config), store=store)
    assert profile.routing is not None
    cost = find_latency(profile, store, silent).cost
    share = profile.routing.frequency_by_expert()
    experts = [(u, unit) for u, unit in enumerate(profile.candidates.units) if unit.kind == "expert"]
    # One shape is timed once: times differ as the shares of the tokens do.
    per_role: dict[str, list[float]] = {}
    for u, unit in experts:
        frequency = share[unit.layer_index or 0, unit.expert_index or 0]
        per_role.setdefault(unit.role, []).append(cost[u, profile.candidates.format_index("int8_g64")] / frequency)
    assert len(set(share.values())) > 2
    for times in per_role.values():
        np.testing.assert_allclose(times, times[0], rtol=1e-12)


def test_a_device_that_is_not_at_hand_is_modelled(tiny_profile: SensitivityProfile) -> None:
    profile = keep_units(tiny_profile, 4)
    table = find_modelled_latency(profile, "h100-sxm")
    np.testing.assert_array_equal(np.isfinite(table.cost), profile.candidates.allowed)
    assert table.fixed == pytest.approx(profile.fixed_bytes / 3.35e12 * 1e6)
    described = describe_latency({table.resource: table})["latency"]
    assert described == "modelled for NVIDIA H100 SXM (roofline by the bit-parallel law)"
    assert describe_latency({}) == {}
    wider = find_modelled_latency(profile, "h100-sxm", batch_tokens=8)
    assert (wider.cost >= table.cost)[profile.candidates.allowed].all()


def test_a_plan_keeps_a_modelled_latency(tiny_profile: SensitivityProfile, tmp_path: Path) -> None:
    """The solve takes either table. A limit half-way between the fastest and the slowest plan binds."""
    store = Store(tmp_path)
    table = find_modelled_latency(tiny_profile, "loom")
    least = np.nanmin(table.cost, axis=1).sum() + table.fixed
    most = np.nanmax(table.cost, axis=1).sum() + table.fixed
    budget = Budget(bits_per_weight=16.5, limits={"latency_us": float(least + most) / 2})
    plan = allocator.plan(tiny_profile, budget, verify=False, device="loom", store=store)
    assert least <= plan.use["latency_us"] <= plan.limits["latency_us"] < most
    assert plan.provenance["latency"].startswith("modelled for Loom")
    assert plan.latency_text is not None and "us allowed, modelled for Loom" in plan.latency_text
    measured = allocator.plan(
        tiny_profile, Budget(bits_per_weight=16.5, limits={"latency_us": 1e9}), verify=False, store=store
    )
    assert measured.provenance["latency"].startswith("measured for ")
    assert allocator.plan(tiny_profile, Budget(bits_per_weight=8), verify=False, store=store).latency_text is None


def test_a_device_without_a_latency_is_refused(tiny_profile: SensitivityProfile) -> None:
    with pytest.raises(ValueError, match="got device='loom' and no limit on latency_us"):
        allocator.plan(tiny_profile, Budget(bits_per_weight=8), verify=False, device="loom")
    limited = Budget(bits_per_weight=8, limits={"latency_us": 900})
    with pytest.raises(ValueError, match="must be a known name: got 'abacus'"):
        allocator.plan(tiny_profile, limited, verify=False, device="abacus")
