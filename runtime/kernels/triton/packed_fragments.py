"""A packed weight of one factor as the Triton kernels read it: integers, ternary digits, two values, floats.

Ternary digits are integers of 2 bits here, a quarter more than the 1.6 that are stored: five of them to a byte fill
neither the 16 pairs of a thread (``fragment_layout``) nor two tiles of them, and each would take a multiplication.

Storage and execution are two layouts. The kernels' one is made when a weight is first used on a device, and kept with
the weight until its tensors move or change (``kept_layout``).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from runtime.codecs import CODECS
from runtime.codecs.scaled_elements import read_scale_unit
from runtime.elements import ELEMENTS
from runtime.kernels.triton.fragment_layout import SCALE_DTYPES, FragmentWeight, fits_groups, pack_fragments
from runtime.kernels.triton.kept_layout import Packed, find_kept, stored_tensors
from runtime.packing import unpack_codes
from runtime.powers import MOST_EXPONENT
from runtime.storage import Format

FRAGMENT_KINDS = ("int", "element", "binary", "ternary")


def fits_kernels(format_: Format) -> bool:
    """Returns True for kinds of one factor, and groups that are multiplied."""
    return format_.kind in FRAGMENT_KINDS and fits_groups(format_.group_size)


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
    if format_.kind == "binary" and not format_.symmetric:
        return pack_fragments(codes, tensors["high"], tensors["low"], bits=1, group_size=format_.group_size)
    if format_.kind == "ternary":
        # Zero is at the code 1, which is put where integers of 2 bits have it.
        codes = codes + 1
    stored = tensors["scale"]
    # +-s is 2 s (q - 1/2).
    doubled = format_.kind == "binary"
    if format_.scale_type == "pow2":
        scale = (stored.to(torch.int32) + (MOST_EXPONENT + doubled)).to(torch.uint8).view(torch.float8_e8m0fnu)
    else:
        wanted = stored.to(torch.float32) * (1 + doubled)
        scale = wanted.to(torch.float16)
        if not torch.equal(scale.to(torch.float32), wanted):
            return None
    zero_point = tensors.get("zero_point")
    if zero_point is not None:
        zero_point = unpack_codes(zero_point, format_.bits, scale.shape[1])
    return pack_fragments(codes, scale, zero_point, bits=format_.bits, group_size=format_.group_size)


def _make_element_fragments(codes: Tensor, tensors: Mapping[str, Tensor], format_: Format) -> FragmentWeight | None:
    """Returns a weight of elements of few bits; all that scales and elements have in common is in its factor."""
    scale, unit = tensors["scale"].view(SCALE_DTYPES[format_.scale_type]), read_scale_unit(tensors, format_)
    element = ELEMENTS[format_.element]
    integer = element.exponent_bits == 0
    if format_.scale_type == "e8m0":
        # The kernels read the least power of two as zero, which it may be where all elements are.
        magnitude = codes if integer else codes & (2 ** (format_.bits - 1) - 1)
        used = (magnitude != 0).view(*scale.shape, -1).any(dim=-1)
        if bool((used & (tensors["scale"] == 0)).any()):
            return None
    # Two's complement less its offset is the code of which half the range is zero.
    return pack_fragments(
        codes ^ (1 << (format_.bits - 1)) if integer else codes,
        scale,
        None,
        bits=format_.bits,
        group_size=format_.group_size,
        element=-1 if integer else element.mantissa_bits,
        factor=unit * (2.0**-element.mantissa_bits if integer else 2.0 ** (15 - element.bias)),
    )
