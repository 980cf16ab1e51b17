"""The reference: what every kernel must compute, in plain PyTorch.

    y = x W' + bias,   W = scale * (codes - zero_point) in float32, rounded to the type of x

It materialises the whole matrix for every product, so it is also the slowest path.
"""

from torch import Tensor, nn

from runtime.packing import unpack_codes
from runtime.quantization import dequantize_codes


def dequantize_stored(codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, bits: int, columns: int) -> Tensor:
    """Returns the float32 matrix [rows, columns] of a weight in its stored layout.

    Args:
        codes: [rows, ceil(columns * bits / 8)] uint8.
        scale: [rows, groups] float16.
        zero_point: [rows, ceil(groups * bits / 8)] uint8, or None for 2**(bits - 1).
        bits: Code width, 1 to 8.
        columns: Weights of a row.
    """
    zeros = None if zero_point is None else unpack_codes(zero_point, bits, scale.shape[1])
    return dequantize_codes(unpack_codes(codes, bits, columns), scale, zeros, bits)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns [..., rows] in the type of x for x [..., columns] and a float32 weight [rows, columns]."""
    return nn.functional.linear(x, weight.to(x.dtype), bias)
