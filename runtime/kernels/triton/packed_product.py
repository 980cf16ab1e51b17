"""The product of activations with a packed weight as the checkpoint stores it, by the Triton kernels.

Storage and execution are two layouts. The kernels' one is made when a weight is first used on a device, and kept with
the weight until its tensors move or change.
"""

from typing import Protocol

import torch
from torch import Tensor

from runtime.formats import Format
from runtime.kernels.triton.fragment_layout import FragmentWeight, pack_fragments
from runtime.kernels.triton.weight_only_linear import is_interpreted, triton_linear
from runtime.packing import unpack_codes

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_KEPT = "_fragments"


class Packed(Protocol):
    """What is read of a packed weight."""

    format: Format
    shape: tuple[int, int]
    _buffers: dict[str, Tensor | None]


def packed_linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor | None:
    """Returns x W' + bias in the type of x, or None where the kernels cannot compute it.

    They can on a CUDA device, or on the CPU under Triton's interpreter; for integer formats with groups of 32, 64,
    a multiple of 128 or the whole row; for float16, bfloat16 and float32; without gradients.

    Args:
        x: [..., in_features].
        weight: The packed weight [out_features, in_features].
        bias: [out_features], or None.
    """
    if x.device.type != "cuda" and not is_interpreted():
        return None
    wants_gradient = x.requires_grad and torch.is_grad_enabled()
    if wants_gradient or x.dtype not in _DTYPES or x.shape[-1] != weight.shape[1] or not fits_kernels(weight.format):
        return None
    return triton_linear(x, find_fragments(weight), bias)


def fits_kernels(format_: Format) -> bool:
    """Returns True for the formats that the kernels multiply."""
    size = format_.group_size
    return format_.kind == "int" and (size is None or size in (32, 64) or size % 128 == 0)


def find_fragments(weight: Packed) -> FragmentWeight:
    """Returns an integer weight in the kernels' layout, made once for the tensors it holds now."""
    codes, scale, zero_point = (weight._buffers.get(name) for name in ("codes", "scale", "zero_point"))
    assert codes is not None
    assert scale is not None
    identity = (codes.data_ptr(), codes._version, scale.data_ptr(), scale._version)
    kept: tuple[tuple[int, ...], FragmentWeight] | None = weight.__dict__.get(_KEPT)
    if kept is not None and kept[0] == identity:
        return kept[1]
    bits, groups = weight.format.bits, scale.shape[1]
    fragments = pack_fragments(
        unpack_codes(codes, bits, weight.shape[1]),
        scale,
        None if zero_point is None else unpack_codes(zero_point, bits, groups),
        bits=bits,
        group_size=weight.format.group_size,
    )
    weight.__dict__[_KEPT] = (identity, fragments)
    return fragments
