"""A packed weight of one factor as the Triton kernels read it: integers, one bit of two values, floats of few bits.

Storage and execution are two layouts. The kernels' one is made when a weight is first used on a device, and kept with
the weight until its tensors move or change (``kept_layout``).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from runtime.codecs import CODECS
from runtime.codecs.scaled_elements import read_scale_parts
from runtime.elements import ELEMENTS
from runtime.kernels.triton.fragment_layout import FragmentWeight, fits_groups, pack_fragments
from runtime.kernels.triton.kept_layout import Packed, find_kept, stored_tensors
from runtime.packing import unpack_codes
from runtime.powers import power_of_two
from runtime.storage import Format


def fits_kernels(format_: Format) -> bool:
    """Returns True for integers, one bit of two opposite values, floats of few bits, and groups that are multiplied."""
    kind = format_.kind in ("int", "element") or (format_.kind == "binary" and format_.symmetric)
    return kind and fits_groups(format_.group_size)


def find_fragments(weight: Packed) -> FragmentWeight | None:
    """Returns a weight in the kernels' layout, made once for the tensors it holds now; None if a scale is no float16.

    Args:
        weight: A packed weight in a format of ``fits_kernels``.
    """
    return find_kept(weight, make_fragments)


def make_fragments(weight: Packed) -> FragmentWeight | None:
    """Returns a weight of a format of ``fits_kernels`` in the kernels' layout; None if a scale is no float16 number."""
    format_ = weight.format
    tensors = stored_tensors(weight)
    codes = CODECS[format_.kind].codes(tensors, format_, weight.shape, None)
    if format_.kind == "element":
        return _make_element_fragments(codes, tensors, format_)
    stored = tensors["scale"]
    scale = power_of_two(stored) if format_.scale_type == "pow2" else stored.to(torch.float32)
    if format_.kind == "binary":
        # +-s is 2 s (q - 1/2).
        scale = 2 * scale
    if not _is_half(scale):
        return None
    zero_point = tensors.get("zero_point")
    if zero_point is not None:
        zero_point = unpack_codes(zero_point, format_.bits, scale.shape[1])
    return pack_fragments(codes, scale, zero_point, bits=format_.bits, group_size=format_.group_size)


def _make_element_fragments(codes: Tensor, tensors: Mapping[str, Tensor], format_: Format) -> FragmentWeight | None:
    """Returns a weight of elements of few bits; all that scales and elements have in common is in its factor."""
    scale, unit = read_scale_parts(tensors, format_)
    element = ELEMENTS[format_.element]
    integer = element.exponent_bits == 0
    # A scale of zeros may be any number: it must not be the one that is too small for float16.
    magnitude = codes if integer else codes & (2 ** (format_.bits - 1) - 1)
    scale = torch.where((magnitude != 0).view(*scale.shape, -1).any(dim=-1), scale, 0.0)
    # Powers of two reach beyond float16: the greatest becomes its greatest, and the least may be 2**-39 of it.
    shared = 2.0 ** (int(torch.frexp(scale.amax()).exponent) - 16) if format_.scale_type == "e8m0" else 1.0
    scale = scale / shared
    if not _is_half(scale):
        return None
    # Two's complement less its offset is the code of which half the range is zero.
    return pack_fragments(
        codes ^ (1 << (format_.bits - 1)) if integer else codes,
        scale,
        None,
        bits=format_.bits,
        group_size=format_.group_size,
        element=-1 if integer else element.mantissa_bits,
        factor=unit * shared * (2.0**-element.mantissa_bits if integer else 2.0 ** (15 - element.bias)),
    )


def _is_half(scale: Tensor) -> bool:
    return torch.equal(scale.to(torch.float16).to(torch.float32), scale)
