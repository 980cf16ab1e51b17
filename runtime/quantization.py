"""The quantized weight as a value: codes, scales, zero points, and the one rule that turns them back.

    weight[i, j] ~ scale[i, g] * (codes[i, j] - zero_point[i, g]),   g = j // group_size

The product is taken in float32 from the float16 scale, so that every path (a simulated weight, a packed
layer, a reloaded file) arrives at the same float32 number.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.storage import Format


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """One weight in an integer format, codes not yet packed.

    Args:
        format: The integer format.
        codes: [out_features, in_features] uint8.
        scale: [out_features, groups] float16, positive.
        zero_point: [out_features, groups] uint8, or None when the format is symmetric.
        quantizer: Name of the rule that made it, where it is known; not stored.
    """

    format: Format
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    quantizer: str = ""


def dequantize(quantized: QuantizedWeight) -> Tensor:
    """Returns the float32 weight [out_features, in_features] that the codes stand for."""
    return dequantize_codes(quantized.codes, quantized.scale, quantized.zero_point, quantized.format.bits)


def dequantize_codes(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Returns scale * (codes - zero_point) in float32.

    Args:
        codes: [rows, in_features] uint8.
        scale: [rows, groups] float16.
        zero_point: [rows, groups] uint8, or None for 2**(bits - 1).
        bits: Code width.
    """
    rows, groups = scale.shape
    values = codes.view(rows, groups, -1).to(torch.float32)
    if zero_point is None:
        values -= float(1 << (bits - 1))
    else:
        values -= zero_point.to(torch.float32).unsqueeze(-1)
    values *= scale.to(torch.float32).unsqueeze(-1)
    return values.view(rows, -1)
