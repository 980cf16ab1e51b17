"""Clipping: the best of all factors group by group, never worse than round-to-nearest."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.formats import FORMATS
from runtime.quantization import QuantizedWeight, dequantize
from runtime.quantizers import InputStatistics
from runtime.quantizers.clipping import SHRINK_FACTORS, quantize_clipping
from runtime.quantizers.rtn import quantize_rtn
from tests.runtime.quantizers.cases import Array, draw_statistics, draw_weight, to_float64

NAMES = ["int2_g32", "int3_g32_sym", "int4_channel"]


def errors_by_group(quantized: QuantizedWeight, weight: torch.Tensor, importance: Array) -> Array:
    squares = (to_float64(dequantize(quantized)) - to_float64(weight)) ** 2 * importance
    errors: Array = squares.reshape(*quantized.scale.shape, -1).sum(-1)
    return errors


def best_errors(weight: Array, importance: Array, format_name: str) -> Array:
    """Returns the least error [rows, groups] over all factors, in float64 from the ranges on."""
    format_ = FORMATS[format_name]
    top = (1 << format_.bits) - 1
    groups = weight.reshape(len(weight), format_.group_count(weight.shape[1]), -1)
    weights = np.broadcast_to(importance, weight.shape).reshape(groups.shape)
    least = np.full(groups.shape[:2], np.inf)
    for factor in SHRINK_FACTORS:
        low, high = groups.min(-1) * factor, groups.max(-1) * factor
        if format_.symmetric:
            wanted, zero = 2 * np.maximum(-low, high) / top, np.full(low.shape, 1 << (format_.bits - 1))
        else:
            low = np.minimum(low, 0)
            wanted = (np.maximum(high, 0) - low) / top
            zero = np.array(0)
        scale = wanted.astype(np.float16)
        scale = np.where(scale.astype(np.float64) < wanted, np.nextafter(scale, np.float16(np.inf)), scale)
        scale = scale.astype(np.float64)
        zero = zero if format_.symmetric else np.rint(-low / scale)
        codes = np.clip(np.rint(groups / scale[..., None]) + zero[..., None], 0, top)
        error = ((scale[..., None] * (codes - zero[..., None]) - groups) ** 2 * weights).sum(-1)
        least = np.minimum(least, error)
    return least


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_group_has_the_best_factor(name: str, weighted: bool) -> None:
    weight, statistics = draw_weight(20, 96), draw_statistics(96)
    importance = to_float64(statistics.hessian().diagonal()) if weighted else np.ones(96)
    quantized = quantize_clipping(weight, FORMATS[name], statistics if weighted else None)
    # The range of a factor is rounded in float32, which can move its scale by one float16 step of 2^-10.
    best = best_errors(to_float64(weight), importance, name)
    assert (errors_by_group(quantized, weight, importance) <= best * 1.01).all()


@settings(deadline=None, max_examples=60)
@given(name=st.sampled_from(NAMES), weighted=st.booleans(), exponent=st.integers(-6, 3), seed=st.integers(0, 2**31))
def test_round_to_nearest_is_never_better(name: str, weighted: bool, exponent: int, seed: int) -> None:
    weight = draw_weight(3, 64, seed) * 10.0**exponent
    statistics = draw_statistics(64, seed=seed)
    importance = to_float64(statistics.hessian().diagonal()) if weighted else np.ones(64)
    clipped = quantize_clipping(weight, FORMATS[name], statistics if weighted else None)
    # Errors are compared in float32 sums of up to 64 terms.
    bound = errors_by_group(quantize_rtn(weight, FORMATS[name]), weight, importance) * (1 + 64 * 2.0**-23)
    assert (errors_by_group(clipped, weight, importance) <= bound).all()


def test_two_bits_gain_much() -> None:
    weight = draw_weight(50, 64)
    clipped = errors_by_group(quantize_clipping(weight, FORMATS["int2_g64"]), weight, np.ones(64)).sum()
    nearest = errors_by_group(quantize_rtn(weight, FORMATS["int2_g64"]), weight, np.ones(64)).sum()
    assert clipped < 0.6 * nearest


def test_the_whole_range_is_round_to_nearest() -> None:
    weight = draw_weight(3, 64)
    clipped = quantize_clipping(weight, FORMATS["int3_g32"], factors=(1.0,))
    assert torch.equal(dequantize(clipped), dequantize(quantize_rtn(weight, FORMATS["int3_g32"])))


def test_equal_inputs_are_no_inputs() -> None:
    weight = draw_weight(3, 64)
    isotropic = quantize_clipping(weight, FORMATS["int3_g32"], InputStatistics.isotropic(64))
    assert torch.equal(dequantize(isotropic), dequantize(quantize_clipping(weight, FORMATS["int3_g32"])))


@pytest.mark.parametrize("factors", [(), (0.0,), (1.0, 1.1)])
def test_factors_out_of_range_are_refused(factors: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"factors must be numbers above 0, at most 1: got \["):
        quantize_clipping(draw_weight(1, 32), FORMATS["int2_g32"], factors=factors)
