"""The product of activations with a packed weight as the checkpoint stores it, by the Triton kernels.

Storage and execution are two layouts. The kernels' one is made when a weight is first used on a device, and kept with
the weight until its tensors move or change.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from runtime.activation_formats import ActivationFormat, ActivationRounding
from runtime.codecs import CODECS
from runtime.codecs.scaled_elements import read_scale_unit
from runtime.elements import ELEMENTS
from runtime.kernels.triton.fragment_layout import FragmentWeight, fits_groups, pack_fragments
from runtime.kernels.triton.integer_linear import fits_integers, triton_integer_linear
from runtime.kernels.triton.weight_only_linear import triton_linear
from runtime.packing import unpack_codes
from runtime.powers import MOST_EXPONENT
from runtime.storage import Format

PRODUCT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_KEPT = "_fragments"
_SCALE_DTYPES = {"fp16": torch.float16, "e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}
Identity = tuple[tuple[int, int], ...]


class Packed(Protocol):
    """What is read of a packed weight."""

    format: Format
    shape: tuple[int, int]
    _buffers: dict[str, Tensor | None]


def packed_linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor | None:
    """Returns x W' + bias in the type of x, or None where the kernels cannot compute it.

    They can where they run at all (``serves``), for the formats of ``fits_kernels`` whose scales are float16 numbers,
    for float16, bfloat16 and float32, and without gradients.

    Args:
        x: [..., in_features].
        weight: The packed weight [out_features, in_features].
        bias: [out_features], or None.
    """
    fragments = _find_factor(x, weight)
    return None if fragments is None else triton_linear(x, fragments, bias)


def packed_integer_linear(
    x: Tensor, weight: Packed, bias: Tensor | None, rounding: ActivationRounding
) -> Tensor | None:
    """Returns x^ W' + bias, x^ being x rounded to integers, or None where no kernel multiplies these integers.

    One does where ``packed_linear`` does, for weights of ``fits_integers`` and integers that share a scale in a row.

    Args:
        x: [..., in_features], not rounded yet.
        weight: The packed weight [out_features, in_features].
        bias: [out_features], or None.
        rounding: How x is rounded.
    """
    format_ = rounding.format
    if not isinstance(format_, ActivationFormat) or format_.element or format_.scope == "channel":
        return None
    fragments = _find_factor(x, weight)
    if fragments is None or not fits_integers(fragments):
        return None
    scales = rounding.list_row_scales(x)
    return triton_integer_linear(x, fragments, bias, scales, reach=format_.reach, limit=format_.limit)


def _find_factor(x: Tensor, weight: Packed) -> FragmentWeight | None:
    """Returns a weight in the kernels' layout if they can multiply x with it."""
    wants_gradient = x.requires_grad and torch.is_grad_enabled()
    if (
        wants_gradient
        or x.dtype not in PRODUCT_DTYPES
        or x.shape[-1] != weight.shape[1]
        or not fits_kernels(weight.format)
    ):
        return None
    return find_fragments(weight)


def fits_kernels(format_: Format) -> bool:
    """Returns True for integers, one bit of two opposite values, floats of few bits, and groups that are multiplied."""
    kind = format_.kind in ("int", "element") or (format_.kind == "binary" and format_.symmetric)
    return kind and fits_groups(format_.group_size)


def find_fragments(weight: Packed) -> FragmentWeight | None:
    """Returns a weight in the kernels' layout, made once for the tensors it holds now; None if a scale is no float16.

    Args:
        weight: A packed weight in a format of ``fits_kernels``.
    """
    kept: tuple[Identity, FragmentWeight | None] | None = weight.__dict__.get(_KEPT)
    if torch.compiler.is_compiling():
        # Addresses mean nothing in a traced graph: a weight that was used before is taken as it was.
        return None if kept is None else kept[1]
    identity = identify_tensors(weight)
    if kept is None or kept[0] != identity:
        kept = identity, make_fragments(weight)
        weight.__dict__[_KEPT] = kept
    return kept[1]


def identify_tensors(weight: Packed) -> Identity:
    """Returns what changes when a weight's tensors move or are written to."""
    tensors = [tensor for tensor in weight._buffers.values() if tensor is not None]
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)


def make_fragments(weight: Packed) -> FragmentWeight | None:
    """Returns a weight of a format of ``fits_kernels`` in the kernels' layout; None if a scale is no float16 number."""
    format_ = weight.format
    tensors = {name: tensor for name, tensor in weight._buffers.items() if tensor is not None}
    codes = CODECS[format_.kind].codes(tensors, format_, weight.shape, None)
    if format_.kind == "element":
        return _make_element_fragments(codes, tensors, format_)
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
    scale, unit = tensors["scale"].view(_SCALE_DTYPES[format_.scale_type]), read_scale_unit(tensors, format_)
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
