"""Latency tables are measured once a device and set of candidates."""

from dataclasses import replace
from pathlib import Path

import numpy as np

import allocator
from allocator.progress import silent
from allocator.store import Store
from allocator.timings import find_latency
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
