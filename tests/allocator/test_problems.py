"""Problems: limits of whole models become limits of the units, fixed use taken off."""

import numpy as np
import pytest

from allocator.budget import Budget
from allocator.problems import build_cost_tables, build_problem, resolve_limits
from runtime.costs import CostTable
from sensitivity.profile import SensitivityProfile


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget(memory_bytes=1e5), {"memory_bytes": 1e5}),
        (Budget(memory_bytes=1e5, limits={"memory_bytes": 9e4}), {"memory_bytes": 9e4}),
        (Budget(memory_bytes=1e5, limits={"memory_bytes": 2e5}), {"memory_bytes": 1e5}),
        (Budget(max_kl=0.1), {}),
        (
            Budget(max_kl=0.1, limits={"latency_us": 5.0, "read_bytes": 7.0}),
            {"read_bytes": 7.0, "latency_us": 5.0},
        ),
    ],
)
def test_limits(budget: Budget, expected: dict[str, float], tiny_profile: SensitivityProfile) -> None:
    assert resolve_limits(tiny_profile, budget) == expected


def test_bits_per_weight_become_bytes_of_the_file(tiny_profile: SensitivityProfile) -> None:
    weights = sum(unit.weight_count for unit in tiny_profile.candidates.units)
    limits = resolve_limits(tiny_profile, Budget(bits_per_weight=4))
    assert limits == {"memory_bytes": tiny_profile.fixed_bytes + weights / 2}
    limits = resolve_limits(tiny_profile, Budget(bits_per_weight=4, limits={"memory_bytes": 5.0}))
    assert limits == {"memory_bytes": 5.0}


def test_fixed_use_is_taken_off_the_limits(tiny_profile: SensitivityProfile) -> None:
    tables = build_cost_tables(tiny_profile)
    assert tables["memory_bytes"].fixed == tiny_profile.fixed_bytes
    assert tables["read_bytes"].fixed == tiny_profile.rest_bytes
    loss = tiny_profile.table("fisher").loss
    problem = build_problem(tiny_profile, loss, {"read_bytes": 5e4}, tables)
    assert problem.resources == ("memory_bytes", "read_bytes")
    np.testing.assert_array_equal(problem.limit, [np.inf, 5e4 - tiny_profile.rest_bytes])
    np.testing.assert_array_equal(problem.cost[1], tables["read_bytes"].cost)
    np.testing.assert_array_equal(problem.allowed, tiny_profile.candidates.allowed)


def test_measured_latency_is_a_resource(tiny_profile: SensitivityProfile) -> None:
    cost = np.where(tiny_profile.candidates.allowed, 2.0, np.nan)
    latency = CostTable(resource="latency_us", cost=cost, fixed=0.0, unit_of_measure="us", source="measured")
    tables = build_cost_tables(tiny_profile, latency)
    problem = build_problem(tiny_profile, tiny_profile.table("fisher").loss, {"latency_us": 30.0}, tables)
    assert problem.resources == ("memory_bytes", "latency_us")
    assert problem.limit[1] == 30.0


def test_a_batch_reads_linear_layers_once_and_a_row_of_the_embedding_each(tiny_profile: SensitivityProfile) -> None:
    one, many = build_cost_tables(tiny_profile), build_cost_tables(tiny_profile, batch_tokens=8)
    embedding = np.array([unit.kind == "embedding" for unit in tiny_profile.candidates.units])
    assert embedding.any()
    np.testing.assert_array_equal(one["read_bytes"].cost[~embedding], many["read_bytes"].cost[~embedding])
    np.testing.assert_array_equal(8 * one["read_bytes"].cost[embedding], many["read_bytes"].cost[embedding])
