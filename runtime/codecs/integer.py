"""Integers on a grid: codes, one scale a group, and one zero point a group when asymmetric.

The rules that choose them are the quantizers; this file packs what they chose, ``runtime/packing.py`` does the bits.
"""

import torch
from torch import Tensor

from runtime.codecs.codec import Codec, StoredTensors, pick
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
    scale, zero_point = pick(tensors["scale"], rows), None
    if format_.scale_type == "pow2":
        scale = power_of_two(scale)
    if not format_.symmetric:
        zero_point = unpack_codes(pick(tensors["zero_point"], rows), format_.bits, scale.shape[1])
    return dequantize_codes(integer_codes(tensors, format_, shape, rows), scale, zero_point, format_.bits)


def integer_codes(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the codes as uint8."""
    return unpack_codes(pick(tensors["codes"], rows), format_.bits, shape[1])


INTEGER = Codec(encode=encode_integer, decode=decode_integer, codes=integer_codes)
