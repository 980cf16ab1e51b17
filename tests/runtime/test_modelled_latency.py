"""Modelled latencies against the arithmetic of a roofline."""

from dataclasses import replace

import numpy as np
import pytest

from runtime.candidates import list_candidates
from runtime.device_models import DEVICE_MODELS
from runtime.formats import FORMATS
from runtime.modelled_latency import model_latency
from runtime.units import find_units
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral

NAMES = ("int2_g64", "int4_g64", "bf16")
H100 = DEVICE_MODELS["h100-sxm"]
BITS_MATTER = replace(DEVICE_MODELS["loom"], products_per_s=1e9)


def test_one_token_on_a_gpu_takes_the_time_of_its_bytes() -> None:
    candidates = list_candidates(find_units(build_tiny_llama()), NAMES)
    table = model_latency(candidates, H100, 1000)
    assert (table.resource, table.unit_of_measure, table.source) == ("latency_us", "us", "modelled")
    assert table.device == "NVIDIA H100 SXM (roofline by the bit-parallel law)"
    assert table.fixed == pytest.approx(1e6 * 1000 / 3.35e12)
    assert np.array_equal(np.isnan(table.cost), ~candidates.allowed)
    for u, f in zip(*np.nonzero(candidates.allowed), strict=True):
        unit, format_ = candidates.units[u], candidates.formats[f]
        (weight,) = unit.weights
        if weight.kind == "embedding":
            read_bytes = format_.storage_bytes(weight.shape) / weight.shape[0]
        else:
            read_bytes = format_.storage_bytes(weight.shape) + 2 * sum(weight.shape)
        assert table.cost[u, f] == pytest.approx(1e6 * read_bytes / 3.35e12), unit.name


def test_many_tokens_are_bound_by_products_whatever_the_format() -> None:
    candidates = list_candidates(find_units(build_tiny_llama()), NAMES)
    table = model_latency(candidates, replace(H100, products_per_s=1e9), 0, batch_tokens=100)
    for u, unit in enumerate(candidates.units):
        (weight,) = unit.weights
        if weight.kind == "linear":
            allowed = table.cost[u][candidates.allowed[u]]
            assert allowed == pytest.approx(1e6 * 100 * np.prod(weight.shape) / 1e9)


def test_a_bit_serial_machine_is_as_slow_as_codes_are_wide() -> None:
    candidates = list_candidates(find_units(build_tiny_llama()), NAMES)
    cost = model_latency(candidates, BITS_MATTER, 0).cost
    for u, unit in enumerate(candidates.units):
        if unit.kind == "linear":
            two, four, sixteen = cost[u]
            assert four == pytest.approx(2 * two)
            assert sixteen == pytest.approx(8 * two)


def test_experts_take_their_tokens_and_are_read_when_any_takes_them() -> None:
    candidates = list_candidates(find_units(build_tiny_mixtral()), ["int4_g64"])
    layers, experts = 2, 4
    frequency = {(layer, expert): expert / 8 for layer in range(layers) for expert in range(experts)}
    batch = 3
    reads = model_latency(candidates, H100, 0, expert_frequency=frequency, batch_tokens=batch).cost[:, 0]
    works = model_latency(candidates, BITS_MATTER, 0, expert_frequency=frequency, batch_tokens=batch).cost[:, 0]
    seen = 0
    for u, unit in enumerate(candidates.units):
        if unit.kind != "expert":
            continue
        (weight,) = unit.weights
        share = (unit.expert_index or 0) / 8
        read_bytes = FORMATS["int4_g64"].storage_bytes(weight.shape) * (1 - (1 - share) ** batch)
        read_bytes += 2 * batch * share * sum(weight.shape)
        assert reads[u] == pytest.approx(1e6 * read_bytes / 3.35e12)
        # At 8 bits of activations a token is half as much work as the weights alone, of which there is one at most.
        tokens = max(min(batch * share, 1.0), batch * share / 2)
        assert works[u] == pytest.approx(1e6 * tokens * np.prod(weight.shape) * (4 / 16) / 1e9)
        seen += 1
    assert seen == layers * experts * 2
