"""The structure of the latency table; how long anything takes is not tested."""

import numpy as np
import torch

from runtime import latency
from runtime.candidates import list_candidates
from runtime.formats import FORMATS
from runtime.latency import device_name, measure_latency
from runtime.units import find_units
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral

DENSE = "model.layers.0.mlp.gate_proj+up_proj"
LAST = "layers.1.mlp.experts.gate_up_proj[3]+down_proj[3]"
NAMES = ("int2_g64", "int4_g128", "int5_channel_sym", "bf16")


def test_table_of_a_dense_model() -> None:
    candidates = list_candidates(find_units(build_tiny_llama(tied=True)), NAMES)
    calls: list[tuple[int, int]] = []
    table = measure_latency(candidates, expert_share=1.0, progress=lambda done, total: calls.append((done, total)))
    assert np.array_equal(np.isnan(table.cost), ~candidates.allowed)
    assert (table.cost[candidates.allowed] > 0).all()
    assert (table.resource, table.unit_of_measure, table.source, table.fixed) == ("latency_us", "us", "measured", 0.0)
    assert table.device == device_name()
    assert torch.__version__ in device_name()
    # Once per distinct shape and format: q and o share theirs, so do k and v, gate and up.
    # Rows of 64 weights take three of the formats; down_proj all four; the table not the one of 2 bits.
    # Each of them in three turns.
    timings = 3 * (3 * 3 + 4 + 2)
    assert calls == [(i, timings) for i in range(1, timings + 1)]


def test_equal_shapes_cost_the_same() -> None:
    candidates = list_candidates(find_units(build_tiny_llama()), NAMES)
    cost = measure_latency(candidates, expert_share=1.0).cost
    by_name = {unit.name: row for unit, row in zip(candidates.units, cost, strict=True)}
    layers = "model.layers.{}.self_attn.{}_proj"
    assert np.array_equal(by_name[layers.format(0, "q")], by_name[layers.format(1, "o")], equal_nan=True)
    assert np.array_equal(by_name[layers.format(0, "k")], by_name[layers.format(1, "v")], equal_nan=True)
    # The embedding reads a row, the head of the same shape everything: two entries, timed apart.
    assert not np.array_equal(by_name["model.embed_tokens"], by_name["lm_head"], equal_nan=True)


def test_unit_sums_its_weights_and_an_expert_counts_by_its_share() -> None:
    """The sums, from times that are given: those of a clock would have no expected value."""
    (expert,) = (u for u in find_units(build_tiny_mixtral(), fuse=[r"(gate_up|down)_proj"]) if u.name.endswith(LAST))
    (dense,) = (u for u in find_units(build_tiny_llama(), fuse=[r"(gate|up)_proj"]) if u.name == DENSE)
    timed = {((256, 64), "bf16", False): 3.0, ((64, 128), "bf16", False): 5.0, ((128, 64), "bf16", False): 7.0}
    assert latency._unit_us(expert, FORMATS["bf16"], timed, 0.25, None) == (3.0 + 5.0) * 0.25
    # Where the routing is measured, by that: layer 1, expert 3.
    assert latency._unit_us(expert, FORMATS["bf16"], timed, 0.25, {(1, 3): 0.75}) == (3.0 + 5.0) * 0.75
    assert latency._unit_us(dense, FORMATS["bf16"], timed, 0.25, None) == 7.0 + 7.0


def test_experts_that_no_token_visits_cost_nothing() -> None:
    candidates = list_candidates(find_units(build_tiny_mixtral()), ["int4_g64"])
    cost = measure_latency(candidates, expert_share=0.0).cost[:, 0]
    assert [value > 0 for value in cost] == [unit.kind != "expert" for unit in candidates.units]


def test_mixtures_are_timed_with_as_many_wide_parts_as_they_have() -> None:
    """A mask of zeros would name other numbers of columns and groups than the codes have."""
    units = [unit for unit in find_units(build_tiny_llama()) if unit.name.endswith("layers.0.mlp.down_proj")]
    candidates = list_candidates(units, ["int4_top12int8_g64", "int4_top12int8_channel", "int2_mix25int4_g32"])
    assert candidates.allowed.all()
    assert (measure_latency(candidates, expert_share=1.0).cost > 0).all()
