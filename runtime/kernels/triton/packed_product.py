"""The product of activations with a packed weight as the checkpoint stores it, by the Triton kernels.

Storage and execution are two layouts. The kernels' one is made when a weight is first used on a device, and kept with
the weight until its tensors move or change.
"""

from typing import Protocol

import torch
from torch import Tensor

from runtime.codecs import CODECS
from runtime.kernels.triton.fragment_layout import FragmentWeight, pack_fragments
from runtime.kernels.triton.weight_only_linear import triton_linear
from runtime.packing import unpack_codes
from runtime.powers import power_of_two
from runtime.storage import Format

PRODUCT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_KEPT = "_fragments"
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
    wants_gradient = x.requires_grad and torch.is_grad_enabled()
    if (
        wants_gradient
        or x.dtype not in PRODUCT_DTYPES
        or x.shape[-1] != weight.shape[1]
        or not fits_kernels(weight.format)
    ):
        return None
    fragments = find_fragments(weight)
    return None if fragments is None else triton_linear(x, fragments, bias)


def fits_kernels(format_: Format) -> bool:
    """Returns True for integers, and one bit of two opposite values, with groups that the kernels multiply."""
    kind = format_.kind == "int" or (format_.kind == "binary" and format_.symmetric)
    size = format_.group_size
    return kind and (size is None or size in (32, 64) or size % 128 == 0)


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
    stored = tensors["scale"]
    scale = power_of_two(stored) if format_.scale_type == "pow2" else stored.to(torch.float32)
    if format_.kind == "binary":
        # +-s is 2 s (q - 1/2).
        scale = 2 * scale
    if not torch.equal(scale.to(torch.float16).to(torch.float32), scale):
        return None
    zero_point = tensors.get("zero_point")
    if zero_point is not None:
        zero_point = unpack_codes(zero_point, format_.bits, scale.shape[1])
    return pack_fragments(
        CODECS[format_.kind].codes(tensors, format_, weight.shape, None),
        scale,
        zero_point,
        bits=format_.bits,
        group_size=format_.group_size,
    )
