"""Latency tables are measured once a device and set of candidates."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from allocator.store import Store
from allocator.timings import find_latency
from sensitivity.profile import SensitivityProfile
from tests.tiny_measurements import keep_units


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
