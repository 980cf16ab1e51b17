"""The product of activations with a packed weight whose groups have 2 or 4 bits, each read at its own."""

import torch
from torch import Tensor

from runtime.codecs.column_mixture import mixture_of, part_of
from runtime.codecs.group_mixture import list_group_places, read_outlier_columns
from runtime.kernels.triton.group_mixture_layout import HIGH_BITS, MixedGroups, pack_mixed_groups
from runtime.kernels.triton.group_mixture_linear import group_mixture_linear
from runtime.kernels.triton.kept_layout import Packed, find_kept, stored_tensors
from runtime.packing import unpack_codes
from runtime.storage import Format

_GROUP_SIZES = (32, 64)


def multiply_mixed_groups(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor | None:
    """Returns x W' + bias in the type of x; None for another weight than the kernel takes.

    It takes groups of 32 or 64, of 2 and of 4 bits; scales so great that four times one is no float16 are left to the
    reference.

    Args:
        x: [..., in_features] float16, bfloat16 or float32.
        weight: A packed weight of kind ``group_mixture``.
        bias: [out_features], or None.
    """
    mixed = find_kept(weight, make_mixed_groups) if _fits_kernel(weight.format) else None
    return None if mixed is None else group_mixture_linear(x, mixed, bias)


def _fits_kernel(format_: Format) -> bool:
    mixture = mixture_of(format_)
    bits = (mixture.narrow.bits, mixture.wide.bits)
    return bits == (HIGH_BITS, 2 * HIGH_BITS) and format_.group_size in _GROUP_SIZES


def make_mixed_groups(weight: Packed) -> MixedGroups | None:
    """Returns a mixture of groups in the layout of the Triton kernels; None if four times a scale is no float16."""
    format_, tensors, (rows, columns) = weight.format, stored_tensors(weight), weight.shape
    mixture, groups = mixture_of(format_), format_.group_count(columns)
    device, length = tensors["mask"].device, columns // groups
    mask = unpack_codes(tensors["mask"], 1, groups).bool()
    codes = torch.empty((rows, groups, length), dtype=torch.uint8, device=device)
    scale = torch.empty((rows, groups), dtype=torch.float16, device=device)
    zero_point = torch.empty((rows, groups), dtype=torch.uint8, device=device)
    places = list_group_places(mask, torch.arange(rows, device=device))
    for name, part, chosen in zip(("wide", "narrow"), (mixture.wide, mixture.narrow), places, strict=True):
        count = chosen.shape[1]
        if count:
            stored = part_of(tensors, name)
            read = unpack_codes(stored["codes"], part.bits, count * length).view(rows, count, length)
            codes.scatter_(1, chosen.unsqueeze(-1).expand_as(read), read)
            scale.scatter_(1, chosen, stored["scale"])
            zero_point.scatter_(1, chosen, unpack_codes(stored["zero_point"], part.bits, count))
    if not bool((scale * 4).isfinite().all()):
        return None
    outlier_column = torch.empty((rows, 0), dtype=torch.int64, device=device)
    if "outlier" in tensors:
        outlier_column = read_outlier_columns(tensors, None)
    outlier = tensors.get("outlier", torch.empty((rows, 0), dtype=torch.float16, device=device))
    return pack_mixed_groups(codes, scale, zero_point, mask, outlier, outlier_column)
