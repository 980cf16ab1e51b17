"""What every quantizer keeps: storable results, the same each time, from any weight and any statistics."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.formats import FORMATS
from runtime.quantization import dequantize
from runtime.quantizers import QUANTIZERS, STATISTICAL, InputStatistics, quantize
from runtime.rendering import render
from tests.runtime.quantizers.cases import assert_storable, draw_statistics, draw_weight

SHAPES = {
    "int2_g32": (5, 96),
    "int3_g64_sym": (1, 64),
    "int4_channel": (3, 61),
    "int5_g64": (7, 192),
    "int8_channel_sym": (4, 1),
    "int2_channel": (2, 131),
    "int6_g128": (3, 128),
    "int7_g16": (3, 48),
    "int3_g64_pow2": (3, 128),
    "int4_g32_sym_pow2": (5, 96),
}

STATISTICS: dict[str, Callable[[int], InputStatistics]] = {
    "full_rank": lambda n: draw_statistics(n),
    "rank_2": lambda n: draw_statistics(n, inputs=2),
    "rank_2_undamped": lambda n: draw_statistics(n, inputs=2, damping=0.0),
    "dead_channels": lambda n: draw_statistics(n, dead=(0, n // 2)),
    "dead_channels_undamped": lambda n: draw_statistics(n, dead=(0, n // 2), damping=0.0),
    "never_read": lambda n: InputStatistics(second_moment=torch.zeros(n, n), count=1.0),
    "isotropic": InputStatistics.isotropic,
    "gate_weighted": lambda n: InputStatistics(second_moment=0.01 * torch.eye(n) + 0.001, count=0.37),
}

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda normal: normal,
    "zero": torch.zeros_like,
    "constant": lambda normal: torch.full_like(normal, -0.3),
    "tiny": lambda normal: normal * 1e-8,
    "tinier_than_any_scale": lambda normal: normal * 1e-40,
    "large": lambda normal: normal * 1e4,
    "outliers": lambda normal: normal * (1 + 99 * (torch.arange(normal.shape[1]) % 50 == 0)),
    "columns": lambda normal: normal.reshape(normal.shape[1], normal.shape[0]).T,
    "bfloat16": lambda normal: normal.to(torch.bfloat16),
}


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("format_name", ["int2_g32", "int4_channel", "int3_g64_sym"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_result_is_storable_for_any_statistics(quantizer: str, format_name: str, kind: str) -> None:
    rows, in_features = SHAPES[format_name]
    weight = draw_weight(rows, in_features)
    statistics = STATISTICS[kind](in_features)
    quantized = quantize(weight, FORMATS[format_name], quantizer, statistics=statistics)
    assert_storable(quantized, (rows, in_features))
    assert torch.equal(render(weight, FORMATS[format_name], quantizer, statistics=statistics), dequantize(quantized))


@pytest.mark.parametrize("format_name", SHAPES)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_result_is_storable_in_any_format(quantizer: str, format_name: str) -> None:
    rows, in_features = SHAPES[format_name]
    quantized = quantize(
        draw_weight(rows, in_features), FORMATS[format_name], quantizer, statistics=draw_statistics(in_features)
    )
    assert_storable(quantized, (rows, in_features))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("format_name", ["int2_g32", "int3_g64_sym"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_result_is_storable_and_repeated_for_any_weight(quantizer: str, format_name: str, name: str) -> None:
    shape = SHAPES[format_name]
    weight = WEIGHTS[name](draw_weight(*shape))
    before = weight.clone()
    statistics = draw_statistics(shape[1])
    moment = statistics.second_moment.clone()
    quantized = quantize(weight, FORMATS[format_name], quantizer, statistics=statistics)
    assert_storable(quantized, shape)
    again = quantize(weight.clone(), FORMATS[format_name], quantizer, statistics=statistics)
    assert torch.equal(quantized.codes, again.codes)
    assert torch.equal(quantized.scale, again.scale)
    assert torch.equal(dequantize(quantized), dequantize(again))
    assert torch.equal(weight, before)
    assert torch.equal(statistics.second_moment, moment)


@settings(deadline=None, max_examples=40)
@given(
    quantizer=st.sampled_from(list(QUANTIZERS)),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    rows=st.integers(1, 6),
    in_features=st.integers(1, 90),
    inputs=st.integers(1, 200),
    seed=st.integers(0, 2**31),
)
def test_any_shape_is_storable(
    quantizer: str, bits: int, symmetric: bool, rows: int, in_features: int, inputs: int, seed: int
) -> None:
    format_ = FORMATS[f"int{bits}_channel" + ("_sym" if symmetric else "")]
    statistics = draw_statistics(in_features, inputs=inputs, seed=seed)
    quantized = quantize(draw_weight(rows, in_features, seed), format_, quantizer, statistics=statistics)
    assert_storable(quantized, (rows, in_features))


@pytest.mark.parametrize("quantizer", sorted(set(QUANTIZERS) - STATISTICAL))
def test_the_weight_alone_is_enough_for_some(quantizer: str) -> None:
    quantized = quantize(draw_weight(3, 64), FORMATS["int4_g64"], quantizer)
    assert_storable(quantized, (3, 64))
    assert quantized.quantizer == quantizer


@pytest.mark.parametrize("quantizer", sorted(STATISTICAL))
def test_missing_statistics_are_refused(quantizer: str) -> None:
    with pytest.raises(ValueError, match=rf"quantizer '{quantizer}' needs input statistics: got none .*\[3, 64\]"):
        quantize(draw_weight(3, 64), FORMATS["int4_g64"], quantizer)


@pytest.mark.parametrize("quantizer", [*sorted(STATISTICAL), "clipping"])
def test_statistics_of_another_input_are_refused(quantizer: str) -> None:
    with pytest.raises(ValueError, match=r"statistics must be of the weight's inputs: got in_features=32"):
        quantize(draw_weight(3, 64), FORMATS["int4_g64"], quantizer, statistics=draw_statistics(32))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_group_that_does_not_divide_the_row_is_refused(quantizer: str) -> None:
    with pytest.raises(ValueError, match="group_size=64, in_features=96"):
        quantize(draw_weight(2, 96), FORMATS["int4_g64"], quantizer, statistics=draw_statistics(96))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_weights_beyond_float16_scales_are_refused(quantizer: str, value: float) -> None:
    weight = draw_weight(2, 64)
    weight[1, 40] = value
    with pytest.raises(ValueError, match="scales must be finite in float16"):
        quantize(weight, FORMATS["int2_channel"], quantizer, statistics=draw_statistics(64))


def test_unquantized_formats_need_no_statistics() -> None:
    weight = draw_weight(2, 64)
    assert torch.equal(render(weight, FORMATS["bf16"], "gptq"), weight.to(torch.bfloat16).float())


def test_formats_without_an_integer_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="integer formats: got format 'bf16' of kind 'float'"):
        quantize(draw_weight(2, 64), FORMATS["bf16"])
