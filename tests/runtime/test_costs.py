"""Costs against real tensors and against numbers worked out by hand."""

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.apply import pack_weight
from runtime.candidates import Candidates, list_candidates
from runtime.costs import memory_cost, read_cost, unit_bytes
from runtime.units import find_units, read_weight
from tests.runtime.format_mixes import MODELS
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral

NAMES = ("int2_g64", "int3_g32_sym", "int4_g128", "int5_channel", "int8_g64", "bf16")


def cost_of(candidates: Candidates, cost: NDArray[np.float64], unit_name: str, format_name: str) -> float:
    u = next(u for u, unit in enumerate(candidates.units) if unit.name == unit_name)
    return float(cost[u, candidates.format_index(format_name)])


@pytest.mark.parametrize("name", MODELS)
def test_memory_is_that_of_the_packed_tensors(name: str) -> None:
    model = MODELS[name]()
    candidates = list_candidates(find_units(model, fuse=[r"self_attn\.(q|k)_proj"]), NAMES)
    table = memory_cost(candidates, 1234)
    assert np.array_equal(np.isnan(table.cost), ~candidates.allowed)
    for u, f in zip(*np.nonzero(candidates.allowed), strict=True):
        unit, format_ = candidates.units[u], candidates.formats[f]
        packed = [pack_weight(read_weight(model, weight), format_) for weight in unit.weights]
        assert (
            table.cost[u, f]
            == sum(tensor.nbytes for p in packed for tensor in p.buffers())
            == unit_bytes(unit, format_)
        )
    assert (table.fixed, table.resource, table.unit_of_measure, table.source) == (
        1234,
        "memory_bytes",
        "bytes",
        "exact",
    )


def test_reads_of_a_dense_model() -> None:
    candidates = list_candidates(find_units(build_tiny_llama()), NAMES)
    table = read_cost(candidates, 99)
    assert np.array_equal(np.isnan(table.cost), ~candidates.allowed)
    # One row of 64 weights in int8_g64: 64 bytes of codes, a scale of 2, a zero point of 1.
    assert cost_of(candidates, table.cost, "model.embed_tokens", "int8_g64") == 67
    assert cost_of(candidates, table.cost, "model.embed_tokens", "bf16") == 128
    # The head is read in full: 320 rows.
    assert cost_of(candidates, table.cost, "lm_head", "int8_g64") == 320 * 67
    # 64 rows of 128 weights in int4_g128: 64 bytes of codes, a scale, half a byte of zero point rounded up.
    assert cost_of(candidates, table.cost, "model.layers.0.mlp.down_proj", "int4_g128") == 64 * 67
    assert (table.fixed, table.resource, table.unit_of_measure, table.source) == (99, "read_bytes", "bytes", "modelled")


def test_reads_of_a_tied_table_are_those_of_the_head() -> None:
    candidates = list_candidates(find_units(build_tiny_llama(tied=True)), NAMES)
    assert cost_of(candidates, read_cost(candidates, 0).cost, "model.embed_tokens", "int8_g64") == 320 * 67


def test_reads_of_experts_are_the_share_that_a_token_visits() -> None:
    candidates = list_candidates(find_units(build_tiny_mixtral()), NAMES)
    cost = read_cost(candidates, 0, expert_share=0.5).cost
    # 256 rows of 64 weights in int2_g64: 16 bytes of codes, a scale, a quarter byte of zero point rounded up.
    assert cost_of(candidates, cost, "model.layers.0.mlp.experts.gate_up_proj[3]", "int2_g64") == 256 * 19 / 2
    # Other units are not shared among experts.
    assert cost_of(candidates, cost, "model.layers.0.self_attn.q_proj", "int2_g64") == 64 * 19
    everything = read_cost(candidates, 0).cost
    assert cost_of(candidates, everything, "model.layers.0.mlp.experts.gate_up_proj[3]", "int2_g64") == 256 * 19
