"""Learned rounding: starts from clipped rounding, keeps the best of every row, rounds to one of two codes."""

import pytest
import torch

from runtime.formats import FORMATS
from runtime.quantization import dequantize
from runtime.quantizers.clipping import quantize_clipping
from runtime.quantizers.grid import grid_of
from runtime.quantizers.learned_rounding import quantize_learned_rounding
from tests.runtime.quantizers.cases import draw_statistics, draw_weight, errors_by_row

NAMES = ["int2_g32", "int3_g32_sym", "int4_channel"]


@pytest.mark.parametrize("name", NAMES)
def test_no_steps_are_clipping(name: str) -> None:
    weight, statistics = draw_weight(4, 96), draw_statistics(96)
    found = quantize_learned_rounding(weight, FORMATS[name], statistics, steps=0)
    assert torch.equal(dequantize(found), dequantize(quantize_clipping(weight, FORMATS[name], statistics)))


@pytest.mark.parametrize("steps", [1, 5, 60])
@pytest.mark.parametrize("name", NAMES)
def test_no_row_is_worse_than_clipping(name: str, steps: int) -> None:
    weight, statistics = draw_weight(16, 96), draw_statistics(96)
    begun = errors_by_row(quantize_clipping(weight, FORMATS[name], statistics), weight, statistics)
    found = quantize_learned_rounding(weight, FORMATS[name], statistics, steps=steps)
    now = errors_by_row(found, weight, statistics)
    # Compared in float32 by the code.
    assert (now <= begun * (1 + 1e-5)).all()
    if steps == 60:
        assert now.sum() < 0.6 * begun.sum()


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_is_rounded_up_or_down(name: str) -> None:
    weight = draw_weight(8, 96)
    found = quantize_learned_rounding(weight, FORMATS[name], draw_statistics(96), steps=30)
    grid = grid_of(found)
    length = 96 // grid.scale.shape[1]
    scale = grid.scale.float().repeat_interleave(length, dim=1)
    position = weight / scale + grid.zero_point.repeat_interleave(length, dim=1)
    position = position.clamp(0, (1 << found.format.bits) - 1)
    assert bool(((found.codes.float() - position).abs() <= 1 + 1e-5).all())
    assert not torch.equal(found.codes.float(), grid.codes_of(weight))


def test_gradients_are_made_where_they_are_switched_off() -> None:
    weight, statistics = draw_weight(4, 64), draw_statistics(64)
    with torch.no_grad():
        found = quantize_learned_rounding(weight, FORMATS["int2_g32"], statistics, steps=10)
    again = quantize_learned_rounding(weight, FORMATS["int2_g32"], statistics, steps=10)
    assert torch.equal(dequantize(found), dequantize(again))
    assert not dequantize(found).requires_grad


def test_negative_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must not be negative: got steps=-1"):
        quantize_learned_rounding(draw_weight(1, 32), FORMATS["int2_g32"], draw_statistics(32), steps=-1)
