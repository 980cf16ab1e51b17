"""Grids: back and forth between codes and values, scales rounded to float16, rows in blocks."""

import numpy as np
import pytest
import torch

from runtime.formats import FORMATS
from runtime.quantization import dequantize
from runtime.quantizers import quantize
from runtime.quantizers.grid import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    by_row_blocks,
    find_grid,
    grid_of,
    round_scale,
    round_scale_up,
)
from runtime.quantizers.rtn import quantize_rtn
from tests.runtime.quantizers.cases import draw_weight


@pytest.mark.parametrize("name", ["int2_g32", "int3_g32_sym", "int8_channel"])
def test_grid_of_a_quantized_weight_reads_and_writes_it(name: str) -> None:
    quantized = quantize(draw_weight(4, 64), FORMATS[name])
    grid = grid_of(quantized)
    values = grid.values_of(quantized.codes)
    assert torch.equal(values, dequantize(quantized))
    assert torch.equal(grid.codes_of(values).to(torch.uint8), quantized.codes)
    again = grid.quantized(grid.codes_of(values))
    assert torch.equal(dequantize(again), values)


@pytest.mark.parametrize("name", ["int2_g32", "int4_channel_sym"])
def test_nearest_codes_are_nearest(name: str) -> None:
    weight = 2 * draw_weight(3, 64)
    grid = find_grid(weight / 2, FORMATS[name])
    distance = (grid.values_of(grid.codes_of(weight)) - weight).abs()
    for code in range(1 << FORMATS[name].bits):
        other = (grid.values_of(torch.full_like(weight, code)) - weight).abs()
        # Both distances carry the rounding of float32, of values below 16.
        assert bool((distance <= other + 2.0**-20).all())


def test_scales_are_rounded_up_to_the_next_float16() -> None:
    scale = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 100
    rounded = round_scale_up(scale, FORMATS["int4_g64"]).numpy()
    assert (rounded.astype(np.float64) >= scale.numpy()).all()
    assert (np.nextafter(rounded, np.float16(0)).astype(np.float64) < scale.numpy()).all()


def test_scales_are_rounded_to_a_positive_finite_float16() -> None:
    scale = torch.tensor([-1.0, 0.0, 1e-30, 0.1, 1e30])
    expected = torch.tensor([SMALLEST_SCALE, SMALLEST_SCALE, SMALLEST_SCALE, 0.1, LARGEST_SCALE]).to(torch.float16)
    assert torch.equal(round_scale(scale, FORMATS["int4_g64"]), expected)


@pytest.mark.parametrize("name", ["int2_g32", "int2_g32_sym"])
@pytest.mark.parametrize("rows", [1, 4096, 4097])
def test_blocks_of_rows_give_the_whole(name: str, rows: int) -> None:
    weight = draw_weight(rows, 32)
    sizes: list[int] = []

    def quantize_block(block: torch.Tensor) -> object:
        sizes.append(len(block))
        return quantize_rtn(block, FORMATS[name])

    blocks = by_row_blocks(weight, quantize_block)  # type: ignore[arg-type]
    assert torch.equal(dequantize(blocks), dequantize(quantize_rtn(weight, FORMATS[name])))
    assert sum(sizes) == rows
    assert max(sizes) <= 4096


@pytest.mark.parametrize("name", ["int4_g64_pow2", "int4_g64_sym_pow2"])
def test_power_of_two_scales(name: str) -> None:
    """Up: the least power not below. Nearest: no other power is nearer. In float64."""
    scale = torch.rand(2000, generator=torch.Generator().manual_seed(0)).mul(40).sub(25).exp2().clamp(max=30000.0)
    scale[:3] = torch.tensor([1.0, 0.125, 2.0**-30])
    up, nearest = (rounds(scale, FORMATS[name]).double() for rounds in (round_scale_up, round_scale))
    powers = 2.0 ** torch.arange(-24, 16, dtype=torch.float64)
    assert torch.isin(up, powers).all() and torch.isin(nearest, powers).all()
    wanted = scale.double().clamp(min=SMALLEST_SCALE)
    assert ((up >= wanted) & ((up < 2 * wanted) | (up == SMALLEST_SCALE))).all()
    assert torch.equal((nearest - wanted).abs(), (powers - wanted.unsqueeze(1)).abs().amin(1))
    with pytest.raises(ValueError, match="scales must be finite in float16"):
        round_scale_up(torch.tensor([40000.0]), FORMATS[name])
