"""The product of activations with a packed weight that is a sum of parts: binary planes and nested widths.

Each part is read at its own bits, so a weight is read at as many bytes as it is stored in; a nested weight at a lower
width, at those of its first parts.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from runtime.kernels.triton.kept_layout import Packed, find_kept, stored_tensors
from runtime.kernels.triton.parted_layout import CodePart, PartedWeight, arrange_scales, count_tiles, pack_parts
from runtime.kernels.triton.parted_linear import parted_linear
from runtime.packing import unpack_codes
from runtime.powers import LEAST_EXPONENT, MOST_EXPONENT
from runtime.storage import NESTED_WIDTHS, Format

# Plane k is +-s_k, or 0 and s_k.
_PLANES = {"": CodePart(bits=1, zero=0.5, factor=2.0), "zero_one": CodePart(bits=1, zero=0.0, factor=1.0)}


def multiply_parted(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor | None:
    """Returns x W' + bias in the type of x, W at the width it is read at; None if a scale is none that kernels read.

    Args:
        x: [..., in_features] float16, bfloat16 or float32.
        weight: A packed weight of kind ``planes``, ``nested`` or ``double_rounding``.
        bias: [out_features], or None.
    """
    read_at = find_kept(weight, _MAKERS[weight.format.kind])
    return None if read_at is None else parted_linear(x, read_at[weight.width], bias)


def list_parts(format_: Format) -> dict[int, list[CodePart]]:
    """Returns the parts of a weight by the width it is read at.

    Args:
        format_: A format of ``PARTED_KINDS``.
    """
    if format_.kind == "planes":
        return {format_.bits: [_PLANES[format_.element]] * format_.bits}
    if format_.kind == "double_rounding":
        prefix = CodePart(bits=format_.prefix_bits, zero=2.0 ** (format_.prefix_bits - 1), factor=1.0)
        rest = CodePart(bits=format_.rest_bits, zero=2.0 ** (format_.rest_bits - 1), factor=2.0**-format_.rest_bits)
        return {format_.prefix_bits: [prefix], format_.bits: [prefix, rest]}
    # The centres of 2**b equal parts of a range are half-integers, and so are their differences to the centres of the
    # width before.
    added = {width: width - before for before, width in pairwise((0, *NESTED_WIDTHS))}
    return {
        width: [
            CodePart(bits=added[w], zero=(2 ** added[w] - 1) / 2, factor=2.0 ** (width - w))
            for w in NESTED_WIDTHS
            if w <= width
        ]
        for width in NESTED_WIDTHS
    }


def make_planes(weight: Packed) -> dict[int, PartedWeight] | None:
    """Returns a sum of binary planes by its only width; None if a scale is float32's least, which is read as zero."""
    format_, tensors = weight.format, stored_tensors(weight)
    codes = unpack_codes(tensors["codes"], format_.bits, weight.shape[1])
    scale = tensors["scale"]
    if format_.scale_type == "pow2":
        if int(scale.amin()) == LEAST_EXPONENT:
            return None
        scale = (scale.to(torch.int32) + MOST_EXPONENT).to(torch.uint8).view(torch.float8_e8m0fnu)
    planes, parts = [(codes >> k) & 1 for k in range(format_.bits)], list_parts(format_)
    return {width: pack_parts(planes, scale, some, group_size=format_.group_size) for width, some in parts.items()}


def make_nested(weight: Packed) -> dict[int, PartedWeight]:
    """Returns a weight whose widths are prefixes of each other, by width."""
    format_, tensors = weight.format, stored_tensors(weight)
    parts = list_parts(format_)
    codes = [
        unpack_codes(tensors[f"codes_{width}"], part.bits, weight.shape[1])
        for width, part in zip(NESTED_WIDTHS, parts[format_.bits], strict=True)
    ]
    return _read_at_widths(codes, {width: tensors[f"scale_{width}"] for width in NESTED_WIDTHS}, parts, format_)


def make_double_rounding(weight: Packed) -> dict[int, PartedWeight]:
    """Returns a weight in two parts by width: the first one, and both."""
    format_, tensors = weight.format, stored_tensors(weight)
    parts = list_parts(format_)
    codes = [
        unpack_codes(tensors[name], part.bits, weight.shape[1])
        for name, part in zip(("codes", "codes_rest"), parts[format_.bits], strict=True)
    ]
    return _read_at_widths(codes, dict.fromkeys(parts, tensors["scale"]), parts, format_)


def _read_at_widths(
    codes: list[Tensor], scales: Mapping[int, Tensor], parts: Mapping[int, list[CodePart]], format_: Format
) -> dict[int, PartedWeight]:
    """Returns the weights of all widths; their words are the first of one tensor's."""
    full = max(parts)
    whole = pack_parts(codes, scales[full], parts[full], group_size=format_.group_size)
    tiles = count_tiles(whole.shape[1])
    return {
        width: PartedWeight(
            shape=whole.shape,
            parts=tuple(some),
            group_size=whole.group_size,
            words=whole.words[: tiles * sum(part.bits for part in some)],
            scale=whole.scale
            if scales[width] is scales[full]
            else arrange_scales(scales[width], whole.shape[1], whole.group_size),
            each_scaled=False,
        )
        for width, some in parts.items()
    }


_MAKERS = {"planes": make_planes, "nested": make_nested, "double_rounding": make_double_rounding}
PARTED_KINDS = tuple(_MAKERS)
