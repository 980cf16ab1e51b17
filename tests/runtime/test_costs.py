"""Costs against real tensors and against numbers worked out by hand."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.apply import pack_weight
from runtime.cache_formats import CacheLoad
from runtime.cache_units import find_cache_units, list_cache_candidates
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


FREQUENCY = {(layer, e): share for layer in (0, 1) for e, share in enumerate((0.9, 0.6, 0.375, 0.125))}


def test_reads_of_experts_by_their_frequency() -> None:
    candidates = list_candidates(find_units(build_tiny_mixtral()), NAMES)
    cost = read_cost(candidates, 0, expert_share=0.5, expert_frequency=FREQUENCY).cost
    full = read_cost(candidates, 0).cost
    for u, unit in enumerate(candidates.units):
        share = FREQUENCY[unit.layer_index or 0, unit.expert_index or 0] if unit.kind == "expert" else 1.0
        np.testing.assert_allclose(cost[u], share * full[u], rtol=1e-15)
    # A stack reads each of its experts as often as that expert is taken.
    stacks = list_candidates(find_units(build_tiny_mixtral(), experts="stack"), NAMES)
    stacked = read_cost(stacks, 0, expert_frequency=FREQUENCY).cost
    np.testing.assert_allclose(np.nansum(stacked, axis=0)[3], np.nansum(cost, axis=0)[3], rtol=1e-12)


@pytest.mark.parametrize("batch_tokens", [1, 3, 16])
def test_reads_of_a_batch_are_those_of_tokens_drawn_at_random(batch_tokens: int) -> None:
    candidates = list_candidates(find_units(build_tiny_mixtral()), NAMES)
    cost = read_cost(candidates, 0, expert_frequency=FREQUENCY, batch_tokens=batch_tokens).cost
    bytes_of = memory_cost(candidates, 0).cost
    steps = 20_000
    for e in range(4):
        # Each token takes two of the four experts; only how often it takes this one matters.
        taken = np.random.default_rng(e).random((steps, batch_tokens)) < FREQUENCY[0, e]
        read = taken.any(axis=1)
        u = next(u for u, unit in enumerate(candidates.units) if (unit.layer_index, unit.expert_index) == (0, e))
        # Five standard errors of a share.
        assert cost[u, 0] / bytes_of[u, 0] == pytest.approx(read.mean(), abs=5 * 0.5 / steps**0.5)


def test_a_batch_reads_dense_weights_once_and_a_row_for_each_token() -> None:
    candidates = list_candidates(find_units(build_tiny_mixtral()), NAMES)
    one, many = (read_cost(candidates, 7, expert_share=0.5, batch_tokens=b) for b in (1, 4))
    for u, unit in enumerate(candidates.units):
        factor = {"embedding": 4.0, "expert": (1 - 0.5**4) / 0.5}.get(unit.kind, 1.0)
        np.testing.assert_allclose(many.cost[u], factor * one.cost[u], rtol=1e-12)
    assert many.fixed == one.fixed == 7
    everything = read_cost(candidates, 0, expert_share=0.5, batch_tokens=10_000).cost
    np.testing.assert_allclose(everything, memory_cost(candidates, 0).cost, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, "batch_tokens must be at least 1: got batch_tokens=0"),
        ({"expert_frequency": {}}, r"got None for 'model\.layers\.0\.mlp\.experts\.gate_up_proj\[0\]'"),
        ({"expert_frequency": {**FREQUENCY, (0, 0): 1.5}}, "share from 0 to 1 for every expert: got 1.5"),
    ],
)
def test_reads_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    candidates = list_candidates(find_units(build_tiny_mixtral()), NAMES)
    with pytest.raises(ValueError, match=message):
        read_cost(candidates, 0, **options)


def test_a_cache_costs_its_rows_and_a_step_reads_them_all() -> None:
    candidates = list_cache_candidates(
        find_cache_units(build_tiny_llama(head_dim=32)), ("int3_channel", "int4_g32", "bf16")
    )
    # 2 heads of 32 numbers: 12 + 2 + 1 bytes a row at 3 bits, 16 + 2 + 1 at 4 (half a byte of zero point, padded), 64.
    rows = np.tile([2 * 15.0, 2 * 19.0, 2 * 64.0], (4, 1))
    memory = memory_cost(candidates, 100, load=CacheLoad(context=7, batch=3))
    assert np.array_equal(memory.cost, 21 * rows)
    assert memory.fixed == 100
    assert np.array_equal(read_cost(candidates, 0, batch_tokens=3, load=CacheLoad(context=7, batch=3)).cost, 21 * rows)
