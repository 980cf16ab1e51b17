"""Tables of experts, recomputed from the plan and the counts of the routing."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import allocator
from allocator.budget import Budget
from allocator.expert_tables import COMMUNITY_SEED, affinity_table, expert_table
from allocator.store import Store
from runtime.formats import find_formats
from sensitivity.profile import SensitivityProfile
from tests.tiny_measurements import make_request


@pytest.fixture(scope="module")
def mixture(
    tiny_mixtral_dir: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SensitivityProfile]:
    store = Store(tmp_path_factory.mktemp("store"))
    request = make_request(tiny_text)
    config = replace(request.config, metrics=("fisher",))
    yield allocator.measure(str(tiny_mixtral_dir), request=replace(request, config=config), store=store)


def test_each_expert_has_its_frequency_and_its_bytes(mixture: SensitivityProfile) -> None:
    plan = allocator.plan(mixture, Budget(bits_per_weight=5), verify=False)
    table = expert_table(mixture, plan)
    routing = mixture.routing
    assert routing is not None
    assert len(table) == routing.visits.shape[1] * routing.visits.shape[2]
    for row in table.to_dict("records"):
        units = [
            (unit, plan.weights[unit.weights[0].name])
            for unit in mixture.candidates.units
            if (unit.layer_index, unit.expert_index) == (row["layer_index"], row["expert_index"])
        ]
        stored = sum(find_formats([name])[0].storage_bytes(unit.weights[0].shape) for unit, name in units)
        assert row["memory_bytes"] == stored
        assert row["weights"] == sum(unit.weight_count for unit, _ in units)
        assert row["bits_per_weight"] == 8 * stored / row["weights"]
        place = routing.row_of(row["layer_index"]), row["expert_index"]
        assert (row["tokens"], row["frequency"]) == (routing.expert_visits[place], routing.frequency[place])
        group = routing.communities(row["layer_index"], seed=COMMUNITY_SEED)[row["community"]]
        assert row["expert_index"] in group


def test_affinity_has_each_pair_once(mixture: SensitivityProfile) -> None:
    table = affinity_table(mixture.routing)
    routing = mixture.routing
    assert routing is not None
    for layer in routing.layers:
        edges = {tuple(sorted(edge)): w for *edge, w in routing.affinity_graph(layer).edges(data="weight")}
        rows = table[table["layer_index"] == layer]
        found = {(a, b): n for a, b, n in zip(rows["expert_index"], rows["other_index"], rows["tokens"], strict=True)}
        assert found == edges


def test_a_dense_model_has_no_such_tables(tiny_profile: SensitivityProfile) -> None:
    plan = allocator.plan(tiny_profile, Budget(bits_per_weight=5), verify=False)
    assert expert_table(tiny_profile, plan).empty
    assert affinity_table(tiny_profile.routing).empty


def test_experts_measured_as_one_unit_are_still_listed_one_by_one(mixture: SensitivityProfile) -> None:
    plan = allocator.plan(mixture, Budget(bits_per_weight=5), verify=False)
    assert mixture.routing is not None
    _, layers, experts = mixture.routing.visits.shape
    merged = allocator.plan(mixture, Budget(bits_per_weight=16), verify=False, engine="llama.cpp")
    assert len(expert_table(mixture, merged)) == layers * experts == len(expert_table(mixture, plan))
