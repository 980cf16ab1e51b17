"""Nested widths: one stored weight that is read at 4, 6 or 8 bits, the lower codes a prefix of the higher ones.

    value_b = scale_b[i, g] (code_b - 2^(b-1) + 1/2),     code_b = code_8 >> (8 - b),     b = 4, 6, 8

The values lie in the middle of the 2^b equal parts of [-R, R], R = max|w| of the group. Halving the parts halves each
part, so that dropping the low bits of a code is the same as rounding at the lower width; rounding an integer grid with
a zero twice would not be. Each width has its own scale, of the least squared error weighted by the importance h,

    scale_b = sum h w c / sum h c^2,   c = code_b - 2^(b-1) + 1/2,     which is near R / 2^(b-1).

So the root mean square error of a group, weighted or not, is at most R / 2^b and what rounding the scale adds. Reading
at 4 bits reads ``codes_4`` and ``scale_4`` alone, no more bytes than a 4-bit format has; 6 and 8 bits read two more
bits a weight each. Linear time.

Papers: Chen et al. 2025 (Double-Rounding, arXiv:2502.01199), which keeps the integers of the highest width with a scale
for each; Park et al. 2024 (Any-Precision LLM, arXiv:2402.10517) and 2025 (AnyBCQ, arXiv:2510.10467) for the prefix.
"""

from functools import partial

import torch
from torch import Tensor

from runtime.codecs.codec import Codec, StoredTensors, check_range, encode_by_rows, group_importance, pick
from runtime.packing import pack_codes, unpack_codes
from runtime.quantizers.grid import LARGEST_SCALE
from runtime.storage import NESTED_WIDTHS, Format

_FULL_WIDTH = NESTED_WIDTHS[-1]


def encode_nested(weight: Tensor, format_: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the bits that each width adds to the codes, and the scales of each width.

    Raises:
        ValueError: If the group size does not divide the row, or a weight is not finite or beyond float16.
    """
    check_range(weight, format_, LARGEST_SCALE)
    return encode_by_rows(weight, partial(_encode_rows, format_=format_, importance=importance))


def decode_nested(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the values at the full width."""
    return read_at_width(tensors, format_, shape, _FULL_WIDTH, rows)


def nested_codes(tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None) -> Tensor:
    """Returns the codes of the full width as uint8."""
    return _read_codes(tensors, shape, _FULL_WIDTH, rows)


def read_at_width(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], width: int, rows: Tensor | None = None
) -> Tensor:
    """Returns the float32 weight at a width; ``codes_b`` and ``scale_b`` of higher widths are not looked at.

    Args:
        tensors: The stored tensors by name, at least those up to the width.
        format_: The format.
        shape: (out_features, in_features).
        width: One of ``NESTED_WIDTHS``.
        rows: Row indices [n], or None for all rows.

    Raises:
        ValueError: If the weight is not stored at this width.
    """
    if width not in NESTED_WIDTHS:
        msg = (
            f"a nested weight must be read at one of {', '.join(map(str, NESTED_WIDTHS))} bits: got width={width}. "
            "Read the next higher one."
        )
        raise ValueError(msg)
    scale = pick(tensors[f"scale_{width}"], rows).to(torch.float32)
    values = _centres(_read_codes(tensors, shape, width, rows), width)
    return values.view(*scale.shape, -1).mul_(scale.unsqueeze(-1)).view(values.shape)


def _encode_rows(weight: Tensor, format_: Format, importance: Tensor | None) -> dict[str, Tensor]:
    grouped = weight.reshape(len(weight), format_.group_count(weight.shape[1]), -1)
    h = group_importance(importance, grouped)
    half = 1 << (_FULL_WIDTH - 1)
    step = grouped.abs().amax(-1, keepdim=True) / half
    parts = torch.floor(torch.where(step > 0, grouped / step, 0.0)) + half
    codes = parts.clamp_(0, 2 * half - 1).to(torch.uint8).flatten(1)
    tensors, written_bits = {}, 0
    for width in NESTED_WIDTHS:
        prefix = codes >> (_FULL_WIDTH - width)
        added = width - written_bits
        tensors[f"codes_{width}"] = pack_codes(prefix & ((1 << added) - 1), added)
        centres = _centres(prefix, width).view(grouped.shape)
        scale = (h * grouped * centres).sum(-1) / (h * centres.square()).sum(-1)
        tensors[f"scale_{width}"] = scale.to(torch.float16)
        written_bits = width
    return tensors


def _centres(codes: Tensor, width: int) -> Tensor:
    return codes.to(torch.float32).sub_((1 << (width - 1)) - 0.5)


def _read_codes(tensors: StoredTensors, shape: tuple[int, int], width: int, rows: Tensor | None) -> Tensor:
    codes, read_bits = torch.zeros((), dtype=torch.uint8), 0
    for stored_width in NESTED_WIDTHS[: NESTED_WIDTHS.index(width) + 1]:
        added = stored_width - read_bits
        low = unpack_codes(pick(tensors[f"codes_{stored_width}"], rows), added, shape[1])
        codes, read_bits = (codes.to(low.device) << added) | low, stored_width
    return codes


NESTED = Codec(encode=encode_nested, decode=decode_nested, codes=nested_codes, at_width=read_at_width)
