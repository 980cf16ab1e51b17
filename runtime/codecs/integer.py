"""Integers on a grid: codes, one scale a group, and one zero point a group when asymmetric.

The rules that choose them are the quantizers; this file packs what they chose, ``runtime/packing.py`` does the bits.
"""

import torch
from torch import Tensor

from runtime.codecs.codec import Codec, ColumnGrid, StoredTensors, pick
from runtime.packing import pack_codes, unpack_codes
from runtime.powers import floor_exponent, power_of_two
from runtime.quantization import QuantizedWeight, dequantize_codes
from runtime.quantizers.clipping import find_clipped_grid
from runtime.quantizers.rtn import quantize_rtn
from runtime.storage import Format


def pack_quantized(quantized: QuantizedWeight) -> dict[str, Tensor]:
    """Returns the stored tensors of a quantized weight."""
    bits = quantized.format.bits
    scale = quantized.scale
    if quantized.format.scale_type == "pow2":
        scale = floor_exponent(scale.to(torch.float32)).to(torch.int8)
    tensors = {"codes": pack_codes(quantized.codes, bits), "scale": scale}
    if quantized.zero_point is not None:
        tensors["zero_point"] = pack_codes(quantized.zero_point, bits)
    return tensors


def encode_integer(weight: Tensor, format_: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the stored tensors of the weight rounded to nearest, on clipped ranges where there is an importance.

    Raises:
        ValueError: If the group size does not divide the row, or a scale is not a finite float16.
    """
    if importance is None:
        return pack_quantized(quantize_rtn(weight, format_))
    grid = find_clipped_grid(weight, format_, importance)
    return pack_quantized(grid.quantized(grid.codes_of(weight)))


def decode_integer(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns scale * (codes - zero_point)."""
    scale, zero_point = read_steps(tensors, format_, rows)
    return dequantize_codes(integer_codes(tensors, format_, shape, rows), scale, zero_point, format_.bits)


def integer_codes(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the codes as uint8."""
    return unpack_codes(pick(tensors["codes"], rows), format_.bits, shape[1])


def integer_grid(tensors: StoredTensors, format_: Format, shape: tuple[int, int]) -> ColumnGrid:
    """Returns the grids of each column's groups."""
    scale, zero_point = read_steps(tensors, format_, None)
    if zero_point is None:
        zero_point = torch.full_like(scale, 1 << (format_.bits - 1))
    scales, zero_points = (steps.T.to(torch.float32).contiguous() for steps in (scale, zero_point))
    length, top = shape[1] // len(scales), torch.tensor(float((1 << format_.bits) - 1))

    def round_column(j: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return round_to_steps(numbers, scales[j // length], zero_points[j // length], top)

    return ColumnGrid(
        round_column=round_column, with_codes=lambda codes: {**tensors, "codes": pack_codes(codes, format_.bits)}
    )


def read_steps(tensors: StoredTensors, format_: Format, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns the scales and the uint8 zero points [n, groups]; None for those of a symmetric format."""
    scale = pick(tensors["scale"], rows)
    if format_.scale_type == "pow2":
        scale = power_of_two(scale)
    if format_.symmetric:
        return scale, None
    return scale, unpack_codes(pick(tensors["zero_point"], rows), format_.bits, scale.shape[1])


def round_to_steps(numbers: Tensor, scale: Tensor, zero_point: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the nearest codes uint8 from 0 to top, and their values; all float32, of shapes that broadcast."""
    codes = torch.round(numbers / scale).add_(zero_point).clamp_(min=0.0).minimum(top)
    return codes.to(torch.uint8), (codes - zero_point).mul_(scale)


INTEGER = Codec(encode=encode_integer, decode=decode_integer, codes=integer_codes, grid=integer_grid)
