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
from runtime.powers import power_of_two
from runtime.storage import NESTED_WIDTHS, Format

# Plane k is +-s_k, or 0 and s_k.
_PLANES = {"": CodePart(bits=1, zero=0.5, factor=2.0), "zero_one": CodePart(bits=1, zero=0.0, factor=1.0)}


def multiply_parted(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor | None:
    """Returns x W' + bias in the type of x, W at the width it is read at; None if a scale is no float16 number.

    Args:
        x: [..., in_features] float16, bfloat16 or float32.
        weight: A packed weight of kind ``planes``, ``nested`` or ``double_rounding``.
        bias: [out_features], or None.
    """
    read_at = find_kept(weight, _MAKERS[weight.format.kind])
    return None if read_at is None else parted_linear(x, read_at[weight.width], bias)


def make_planes(weight: Packed) -> dict[int, PartedWeight] | None:
    """Returns a sum of binary planes, by its only width; None if a scale is no float16 number."""
    format_, tensors = weight.format, stored_tensors(weight)
    codes, plane = unpack_codes(tensors["codes"], format_.bits, weight.shape[1]), _PLANES[format_.element]
    scale, shared = tensors["scale"].to(torch.float32), 1.0
    if format_.scale_type == "pow2":
        # Powers of two reach beyond float16: the greatest becomes its greatest, and the least may be 2**-39 of it.
        shared = 2.0 ** (int(tensors["scale"].amax()) - 15)
        scale = power_of_two(tensors["scale"]) / shared
    if not torch.equal(scale.to(torch.float16).to(torch.float32), scale):
        return None
    planes = [(codes >> k) & 1 for k in range(format_.bits)]
    parts = [plane] * format_.bits
    return {format_.bits: pack_parts(planes, scale, parts, group_size=format_.group_size, factor=shared)}


def make_nested(weight: Packed) -> dict[int, PartedWeight]:
    """Returns a weight whose widths are prefixes of each other, by width: the centres of equal parts of a range.

    2**b parts have half-integers for centres, and so has each part of a code: its values are the differences to the
    centres of the width before.
    """
    format_, tensors = weight.format, stored_tensors(weight)
    added = {width: width - before for before, width in pairwise((0, *NESTED_WIDTHS))}
    parts = {
        width: [
            CodePart(bits=added[w], zero=(2 ** added[w] - 1) / 2, factor=2.0 ** (width - w))
            for w in NESTED_WIDTHS
            if w <= width
        ]
        for width in NESTED_WIDTHS
    }
    codes = [unpack_codes(tensors[f"codes_{w}"], added[w], weight.shape[1]) for w in NESTED_WIDTHS]
    return _read_at_widths(codes, {w: tensors[f"scale_{w}"] for w in NESTED_WIDTHS}, parts, format_)


def make_double_rounding(weight: Packed) -> dict[int, PartedWeight]:
    """Returns a weight in two parts by width: the first one, and both."""
    format_, tensors = weight.format, stored_tensors(weight)
    bits = (format_.prefix_bits, format_.rest_bits)
    prefix = CodePart(bits=bits[0], zero=2.0 ** (bits[0] - 1), factor=1.0)
    rest = CodePart(bits=bits[1], zero=2.0 ** (bits[1] - 1), factor=2.0 ** -bits[1])
    codes = [
        unpack_codes(tensors[name], b, weight.shape[1]) for name, b in zip(("codes", "codes_rest"), bits, strict=True)
    ]
    parts = {format_.prefix_bits: [prefix], format_.bits: [prefix, rest]}
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
