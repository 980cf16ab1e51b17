"""The grid of a quantized weight: the values that each group's scale and zero point can stand for.

    value = scale[i, g] * (code - zero_point[i, g]),   code = 0 .. 2^bits - 1,   g = j // group length

Every quantizer ends on such a grid, with scales that are float16 and zero points that are codes, so that its result
is what the packed weight stores. A grid is made to span a range [low, high] of each group:

    asymmetric:  scale = (high - low) / (2^b - 1),  zero_point = round(-low / scale),  the range stretched to hold zero
    symmetric:   scale = max(-low, high) / ((2^b - 1) / 2),  zero_point = 2^(b-1)

The scale is rounded up to a float16, or to a power of two where the format stores its exponent, so that the grid
reaches both ends of the range.

Powers of two: Zhao et al. 2024 (ShiftQuant, arXiv:2411.10948): sums of groups then merge by shifts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.formats import Format
from runtime.powers import nearest_exponent, power_of_two
from runtime.quantization import QuantizedWeight

SMALLEST_SCALE = 2.0**-24
LARGEST_SCALE = 65504.0
_LARGEST_EXPONENT = 15
_BLOCK_ROWS = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Scales and zero points of a weight [out_features, in_features], without its codes.

    Args:
        format: The integer format.
        scale: [out_features, groups] float16, positive.
        zero_point: [out_features, groups] float32, whole numbers in the range of a code; the middle one when symmetric.
    """

    format: Format
    scale: Tensor
    zero_point: Tensor

    def codes_of(self, weight: Tensor) -> Tensor:
        """Returns the nearest codes [out_features, in_features] float32."""
        grouped = weight.to(torch.float32).reshape(*self.scale.shape, -1)
        codes = torch.round(grouped / self.scale.to(torch.float32).unsqueeze(-1))
        return codes.add_(self.zero_point.unsqueeze(-1)).clamp_(0, largest_code(self.format)).view(weight.shape)

    def values_of(self, codes: Tensor) -> Tensor:
        """Returns the float32 values [out_features, in_features] of codes of any type."""
        values = codes.to(torch.float32).view(*self.scale.shape, -1) - self.zero_point.unsqueeze(-1)
        return values.mul_(self.scale.to(torch.float32).unsqueeze(-1)).view(codes.shape)

    def quantized(self, codes: Tensor) -> QuantizedWeight:
        """Returns the quantized weight with these codes [out_features, in_features], whole numbers of any type."""
        return QuantizedWeight(
            format=self.format,
            codes=codes.to(torch.uint8),
            scale=self.scale,
            zero_point=None if self.format.symmetric else self.zero_point.to(torch.uint8),
        )


def grid_of(quantized: QuantizedWeight) -> Grid:
    """Returns the grid that a quantized weight lies on."""
    zero_point = quantized.zero_point
    if zero_point is None:
        zero_point = torch.full_like(quantized.scale, 1 << (quantized.format.bits - 1), dtype=torch.float32)
    return Grid(format=quantized.format, scale=quantized.scale, zero_point=zero_point.to(torch.float32))


def largest_code(format_: Format) -> int:
    """Returns 2^bits - 1."""
    return (1 << format_.bits) - 1


def range_of(weight: Tensor, format_: Format) -> tuple[Tensor, Tensor]:
    """Returns the least and the largest value [out_features, groups] of each group.

    Raises:
        ValueError: If the group size does not divide the row.
    """
    rows, in_features = weight.shape
    grouped = weight.to(torch.float32).reshape(rows, format_.group_count(in_features), -1)
    return grouped.amin(-1), grouped.amax(-1)


def span_grid(low: Tensor, high: Tensor, format_: Format) -> Grid:
    """Returns the grid that spans a range [out_features, groups] of each group.

    Raises:
        ValueError: If a scale is not a finite float16.
    """
    top = largest_code(format_)
    if format_.symmetric:
        scale = round_scale_up(torch.maximum(low.abs(), high.abs()) / (top / 2), format_)
        return Grid(format=format_, scale=scale, zero_point=torch.full_like(low, 1 << (format_.bits - 1)))
    low = low.clamp(max=0.0)
    scale = round_scale_up((high.clamp(min=0.0) - low) / top, format_)
    return Grid(format=format_, scale=scale, zero_point=torch.round(-low / scale.to(torch.float32)).clamp_(0, top))


def find_grid(weight: Tensor, format_: Format) -> Grid:
    """Returns the grid that spans every group of a weight [out_features, in_features].

    Raises:
        ValueError: If the group size does not divide the row, or a scale is not a finite float16.
    """
    return span_grid(*range_of(weight, format_), format_)


def round_scale_up(scale: Tensor, format_: Format) -> Tensor:
    """Returns the least float16 not below each scale that the format can store, and at least the smallest positive one.

    Raises:
        ValueError: If one is not finite.
    """
    rounded = _round_up_to_half(scale)
    if format_.scale_type != "pow2":
        return rounded
    mantissa, exponent = torch.frexp(rounded.to(torch.float32))
    # Powers of two have the mantissa one half, and stay.
    return _check_finite(power_of_two(exponent - (mantissa == 0.5).to(torch.int32)).to(torch.float16), scale)


def round_scale(scale: Tensor, format_: Format) -> Tensor:
    """Returns the positive finite float16 that the format can store nearest to each scale."""
    clamped = scale.clamp(SMALLEST_SCALE, LARGEST_SCALE)
    if format_.scale_type != "pow2":
        return clamped.to(torch.float16)
    return power_of_two(nearest_exponent(clamped).clamp_(max=_LARGEST_EXPONENT)).to(torch.float16)


def _round_up_to_half(scale: Tensor) -> Tensor:
    rounded = scale.to(torch.float16).clamp_(min=SMALLEST_SCALE)
    # Positive float16 numbers are ordered as their bits are: one more is the next number, infinity after the largest.
    return _check_finite((rounded.view(torch.int16) + (rounded.to(torch.float32) < scale)).view(torch.float16), scale)


def _check_finite(rounded: Tensor, scale: Tensor) -> Tensor:
    if not bool(torch.isfinite(rounded).all()):
        msg = (
            f"scales must be finite in float16 (weights finite, ranges below 65504 steps): got a largest scale of "
            f"{scale.max().item():g}. Check the weight for non-finite or huge values."
        )
        raise ValueError(msg)
    return rounded


def by_row_blocks(weight: Tensor, quantize_block: Callable[[Tensor], QuantizedWeight]) -> QuantizedWeight:
    """Returns a weight [out_features, in_features] quantized a block of rows at a time, to bound the temporaries."""
    starts = range(0, len(weight), _BLOCK_ROWS)
    parts = [quantize_block(weight[start : start + _BLOCK_ROWS].to(torch.float32)) for start in starts]
    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    return QuantizedWeight(
        format=parts[0].format,
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero_point=torch.cat(zero_points) if zero_points else None,
    )
