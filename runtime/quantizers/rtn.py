"""Round-to-nearest: the range of each group sets its scale, and every weight goes to the nearest code.

Asymmetric: the range is stretched to contain zero, scale = (max - min) / (2^b - 1),
zero_point = round(-min / scale), code = clamp(round(w / scale) + zero_point, 0, 2^b - 1).
Symmetric: scale = max|w| / ((2^b - 1) / 2), code = clamp(round(w / scale), -2^(b-1), 2^(b-1) - 1) + 2^(b-1).

The scale is rounded *up* to float16, so that no weight falls outside the codes and
|w - dequantized(w)| <= scale / 2 holds for every weight (up to float32 rounding). A scale that is a float16
already stays, so an asymmetric group that lies on its own grid, ends included, is reproduced. Linear time.
"""

import torch
from torch import Tensor

from runtime.formats import Format
from runtime.quantization import QuantizedWeight

_SMALLEST_HALF = 2.0**-24


def quantize_rtn(weight: Tensor, format_: Format) -> QuantizedWeight:
    """Returns the weight rounded to nearest in an integer format.

    Args:
        weight: [out_features, in_features], finite.
        format_: An integer format whose group size divides in_features.

    Raises:
        ValueError: If the group size does not divide the row, or a scale is not a finite float16.
    """
    rows, in_features = weight.shape
    groups = format_.group_count(in_features)
    grouped = weight.to(torch.float32).reshape(rows, groups, -1)
    top = (1 << format_.bits) - 1
    if format_.symmetric:
        scale = _round_up_to_half(grouped.abs().amax(-1) / (top / 2))
        zero = float(1 << (format_.bits - 1))
        codes = torch.round(grouped / scale.to(torch.float32).unsqueeze(-1)).add_(zero).clamp_(0, top)
        zero_point = None
    else:
        low = grouped.amin(-1).clamp_(max=0.0)
        scale = _round_up_to_half((grouped.amax(-1).clamp_(min=0.0) - low) / top)
        wide_scale = scale.to(torch.float32)
        offset = torch.round(-low / wide_scale).clamp_(0, top)
        codes = torch.round(grouped / wide_scale.unsqueeze(-1)).add_(offset.unsqueeze(-1)).clamp_(0, top)
        zero_point = offset.to(torch.uint8)
    return QuantizedWeight(
        format=format_, codes=codes.view(rows, in_features).to(torch.uint8), scale=scale, zero_point=zero_point
    )


def _round_up_to_half(scale: Tensor) -> Tensor:
    rounded = scale.to(torch.float16).clamp_(min=_SMALLEST_HALF)
    # Positive float16 numbers are ordered as their bits are: one more is the next number, infinity after the largest.
    rounded = (rounded.view(torch.int16) + (rounded.to(torch.float32) < scale)).view(torch.float16)
    if not bool(torch.isfinite(rounded).all()):
        msg = (
            f"scales must be finite in float16 (weights finite, ranges below 65504 steps): got a largest scale of "
            f"{scale.max().item():g}. Check the weight for non-finite or huge values."
        )
        raise ValueError(msg)
    return rounded
