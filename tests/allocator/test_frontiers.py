"""Frontiers along each resource: every point is the least loss of all choices that use no more."""

from pathlib import Path

import numpy as np
import pytest

import allocator
from allocator.budget import FRONTIER_RESOURCES, LATENCY, MEMORY, Budget
from allocator.frontiers import frontier_along
from allocator.problems import build_cost_tables
from runtime.costs import CostTable
from sensitivity.profile import SensitivityProfile
from tests.tiny_measurements import keep_units, list_choices


@pytest.fixture(scope="module")
def small(tiny_profile: SensitivityProfile) -> SensitivityProfile:
    return keep_units(tiny_profile, 4)


@pytest.fixture(scope="module")
def tables(small: SensitivityProfile) -> dict[str, CostTable]:
    # Times in no order of the bytes: wide formats may be the fast ones.
    times = np.random.default_rng(0).uniform(1.0, 9.0, small.candidates.allowed.shape)
    latency = CostTable(
        resource=LATENCY,
        cost=np.where(small.candidates.allowed, times, np.nan),
        fixed=2.0,
        unit_of_measure="us",
        source="measured",
        device="none",
    )
    return build_cost_tables(small, latency)


@pytest.mark.parametrize("resource", FRONTIER_RESOURCES)
def test_no_choice_within_a_points_use_loses_less(
    resource: str, small: SensitivityProfile, tables: dict[str, CostTable]
) -> None:
    points = frontier_along(small, tables, resource=resource, points=9, metric="fisher")
    choices, rows = list_choices(small), np.arange(4)
    uses = tables[resource].cost[rows, choices].sum(axis=1) + tables[resource].fixed
    losses = small.table("fisher").loss[rows, choices].sum(axis=1)
    sizes = tables[MEMORY].cost[rows, choices].sum(axis=1) + tables[MEMORY].fixed
    assert len(points) == 9
    for point in points:
        within = uses <= point[resource] * (1 + 1e-12)
        assert point["predicted_loss"] == pytest.approx(losses[within].min(), rel=1e-12)
        assert np.isclose(sizes[losses == losses[within].min()], point["memory_bytes"]).any()
    assert points[0][resource] == pytest.approx(uses.min())
    # The last point loses least of all, at no more than that takes.
    assert points[-1]["predicted_loss"] == pytest.approx(losses.min())
    assert points[-1][resource] == pytest.approx(uses[losses == losses.min()].min())


def test_an_engines_frontier_holds_its_plans(tiny_profile: SensitivityProfile) -> None:
    points = allocator.frontier(tiny_profile, points=5, engine="vllm", metric="fisher")
    for point in points[1:]:
        budget = Budget(memory_bytes=round(point["memory_bytes"]))
        planned = allocator.plan(tiny_profile, budget, verify=False, engine="vllm", metric="fisher")
        assert point["predicted_loss"] == pytest.approx(planned.predicted_kl)
    free = allocator.frontier(tiny_profile, points=5, metric="fisher")
    assert points[0]["memory_bytes"] > free[0]["memory_bytes"]


def test_a_frontier_of_read_bytes_shows_itself(tiny_profile: SensitivityProfile) -> None:
    shown = allocator.frontier(tiny_profile, points=4, resource="read_bytes")._repr_html_()
    assert "read_bytes" in shown and "one more of it saves" in shown


def test_other_resources_have_no_frontier(tiny_profile: SensitivityProfile, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be along one of memory_bytes, read_bytes, latency_us: got 'x'"):
        allocator.frontier(tiny_profile, resource="x")
