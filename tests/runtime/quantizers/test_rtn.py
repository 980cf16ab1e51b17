"""Round-to-nearest: the half-scale bound, exact grids, tight scales, and an 8-bit reference in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from runtime.formats import FORMATS, Format
from runtime.quantization import dequantize
from runtime.quantizers import quantize
from runtime.rendering import render

INTEGER_FORMATS = [f for f in FORMATS.values() if f.kind == "int"]
HALF_SCALED_FORMATS = [f for f in INTEGER_FORMATS if f.scale_type == "fp16"]
ASYMMETRIC_FORMATS = [f for f in HALF_SCALED_FORMATS if not f.symmetric]
SHAPE = (6, 256)  # two groups of 128 or more in a row


def add_outliers(normal: Tensor) -> Tensor:
    normal[:, ::50] *= 100
    return normal


def zero_groups(normal: Tensor) -> Tensor:
    normal[0] = 0
    normal[1, :128] = -0.0
    normal[2:, 32:64] = 0
    return normal


WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda normal: normal,
    "outliers": add_outliers,
    "zero_groups": zero_groups,
    "positive": lambda normal: normal.abs() + 0.5,
    "negative": lambda normal: -normal.abs() - 0.5,
    "constant": lambda normal: torch.full_like(normal, 0.3),
    "tiny": lambda normal: normal * 1e-8,
    "tinier_than_any_scale": lambda normal: normal * 1e-40,
    "large": lambda normal: normal * 1e4,
    "many_sizes": lambda normal: normal * 10.0 ** torch.arange(256).remainder(9).sub(6),
    "half_steps": lambda normal: normal.mul(4).round() / 8,
    "columns": lambda normal: normal.reshape(256, 6).T,
}


def draw_weight(name: str) -> Tensor:
    return WEIGHTS[name](torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)))


def steps_of_error(format_: Format) -> float:
    """Returns the largest |w - dequantized(w)| / scale.

    Half a step in real arithmetic. float32 rounds each result by a relative 2^-24 at most: the range and its
    quotient (a weight at the end of the range then lies outside of it by 2 * 2^-24 of up to 2^bits steps), and
    w / scale (another 2^-24 of up to 2^bits steps). Terms of the second order take less than a fourth.
    """
    return 0.5 + 4 * (1 << format_.bits) * 2.0**-24


@pytest.mark.parametrize("format_", INTEGER_FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("name", WEIGHTS)
def test_error_is_half_a_scale_at_most(name: str, format_: Format) -> None:
    weight = draw_weight(name)
    quantized = quantize(weight, format_)
    group_size = format_.group_size or SHAPE[1]
    scale = quantized.scale.double().repeat_interleave(group_size, dim=1)
    error = (weight.double() - dequantize(quantized).double()).abs()
    assert (error <= scale * steps_of_error(format_)).all()
    assert (dequantize(quantized)[weight == 0] == 0).all()
    assert_well_formed(quantized.codes, quantized.scale, quantized.zero_point, format_)
    assert torch.equal(render(weight, format_), dequantize(quantized))


def assert_well_formed(codes: Tensor, scale: Tensor, zero_point: Tensor | None, format_: Format) -> None:
    groups = format_.group_count(SHAPE[1])
    assert (codes.dtype, tuple(codes.shape)) == (torch.uint8, SHAPE)
    assert (scale.dtype, tuple(scale.shape)) == (torch.float16, (SHAPE[0], groups))
    assert int(codes.max()) < 1 << format_.bits
    assert (scale > 0).all()
    if format_.symmetric:
        assert zero_point is None
    else:
        assert zero_point is not None
        assert (zero_point.dtype, tuple(zero_point.shape)) == (torch.uint8, (SHAPE[0], groups))
        assert int(zero_point.max()) < 1 << format_.bits


@pytest.mark.parametrize("format_", HALF_SCALED_FORMATS, ids=lambda f: f.name)
def test_scale_is_the_least_float16_that_spans_the_group(format_: Format) -> None:
    weight = draw_weight("normal").numpy().astype(np.float64)
    groups = weight.reshape(SHAPE[0], format_.group_count(SHAPE[1]), -1)
    top = (1 << format_.bits) - 1
    if format_.symmetric:
        wanted = np.abs(groups).max(-1) * 2 / top
    else:
        wanted = (np.maximum(groups.max(-1), 0) - np.minimum(groups.min(-1), 0)) / top
    scale = quantize(torch.from_numpy(weight).float(), format_).scale.numpy()
    below = np.nextafter(scale, np.float16(0)).astype(np.float64)
    # Two roundings of float32 lie between the exact quotient and the one that is rounded up.
    assert (scale.astype(np.float64) >= wanted * (1 - 2.0**-23)).all()
    assert (below < wanted * (1 + 2.0**-23)).all()


@settings(deadline=None, max_examples=200)
@given(format_=st.sampled_from(ASYMMETRIC_FORMATS), scale_bits=st.integers(1, 0x7000), seed=st.integers(0, 2**32 - 1))
def test_asymmetric_grid_is_reproduced(format_: Format, scale_bits: int, seed: int) -> None:
    """Any float16 scale up to 8192 (subnormal ones too), any zero point, codes that reach both ends."""
    rng = np.random.default_rng(seed)
    top = (1 << format_.bits) - 1
    groups = format_.group_count(256)
    scale = rng.choice([scale_bits, rng.integers(1, 0x7000)], (2, groups)).astype(np.uint16).view(np.float16)
    codes = rng.integers(0, top + 1, (2, groups, 256 // groups))
    codes[..., 3], codes[..., 11] = 0, top
    zero_point = rng.integers(0, top + 1, (2, groups, 1))
    grid = torch.from_numpy((codes - zero_point) * scale[..., None].astype(np.float32)).float().view(2, 256)
    assert torch.equal(render(grid, format_), grid)


def reference_channel_int8(weight: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns scales [rows, 1] and unrounded codes [rows, in_features] of int8_channel, all in float64."""
    low = np.minimum(weight.min(1, keepdims=True), 0)
    wanted = (np.maximum(weight.max(1, keepdims=True), 0) - low) / 255
    scale = wanted.astype(np.float16)
    scale = np.where(scale.astype(np.float64) < wanted, np.nextafter(scale, np.float16(np.inf)), scale)
    scale = scale.astype(np.float64)
    return scale, weight / scale + np.rint(-low / scale)


@pytest.mark.parametrize("in_features", [1, 2, 61, 256])
def test_8_bit_channels_agree_with_float64(in_features: int) -> None:
    weight = torch.randn(200, in_features, generator=torch.Generator().manual_seed(in_features))
    quantized = quantize(weight, FORMATS["int8_channel"])
    scale, position = reference_channel_int8(weight.numpy().astype(np.float64))
    assert np.array_equal(quantized.scale.numpy().astype(np.float64), scale)
    # The quotient of up to 255 steps carries a float32 error of 255 * 2^-24: codes may differ next to a half only.
    assert (np.abs(quantized.codes.numpy() - position) <= 0.5 + 255 * 2.0**-24).all()


@pytest.mark.parametrize("format_", INTEGER_FORMATS, ids=lambda f: f.name)
def test_rows_are_quantized_alone_and_the_same_each_time(format_: Format) -> None:
    weight = draw_weight("outliers")
    whole, again = render(weight, format_), render(weight.clone(), format_)
    assert torch.equal(whole, again)
    assert torch.equal(render(weight[4:5], format_), whole[4:5])
    assert torch.equal(weight, draw_weight("outliers"))


def test_narrow_weights_are_read_as_float32() -> None:
    weight = draw_weight("normal").to(torch.bfloat16)
    assert torch.equal(render(weight, FORMATS["int4_g64"]), render(weight.float(), FORMATS["int4_g64"]))


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_unquantized_formats_round(name: str) -> None:
    weight = draw_weight("normal")
    assert torch.equal(render(weight, FORMATS[name]), weight.to(getattr(torch, FORMATS[name].element)).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, -2e5], ids=str)
@pytest.mark.parametrize("name", ["int2_channel", "int2_g32_sym"])
def test_scales_beyond_float16_are_refused(name: str, value: float) -> None:
    weight = torch.zeros(2, 64)
    weight[1, 40] = value
    with pytest.raises(ValueError, match=r"scales must be finite in float16.*largest scale of (nan|inf|[\de+.]+)\."):
        quantize(weight, FORMATS[name])


def test_largest_scale_is_accepted() -> None:
    weight = torch.tensor([[0.0, 3 * 65504.0]])
    assert torch.equal(render(weight, FORMATS["int2_channel"]), weight)


def test_group_that_does_not_divide_the_row_is_refused() -> None:
    with pytest.raises(ValueError, match="group_size=64, in_features=96"):
        quantize(torch.zeros(2, 96), FORMATS["int4_g64"])


def test_unknown_quantizer_is_refused() -> None:
    with pytest.raises(ValueError, match="known name: got 'magic'. Known quantizers: rtn"):
        quantize(torch.zeros(1, 64), FORMATS["int4_g64"], "magic")
