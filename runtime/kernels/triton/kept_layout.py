"""What the kernels make of a packed weight is made once for the tensors it holds, and kept with it."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from runtime.storage import Format

PRODUCT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_KEPT = "_fragments"
Identity = tuple[tuple[int, int], ...]
Layout = TypeVar("Layout")


class Packed(Protocol):
    """What is read of a packed weight."""

    format: Format
    width: int
    shape: tuple[int, int]
    _buffers: dict[str, Tensor | None]


def can_multiply(x: Tensor, weight: Packed) -> bool:
    """Returns True where the kernels can multiply such activations with a weight: without gradients."""
    wants_gradient = x.requires_grad and torch.is_grad_enabled()
    return not wants_gradient and x.dtype in PRODUCT_DTYPES and x.shape[-1] == weight.shape[1]


def find_kept(weight: Packed, make: Callable[[Packed], Layout | None]) -> Layout | None:
    """Returns what ``make`` makes of a weight, made once for the tensors it holds now; a weight has one ``make``."""
    kept: tuple[Identity, Layout | None] | None = weight.__dict__.get(_KEPT)
    if torch.compiler.is_compiling():
        # Addresses mean nothing in a traced graph: a weight that was used before is taken as it was.
        return None if kept is None else kept[1]
    identity = identify_tensors(weight)
    if kept is None or kept[0] != identity:
        kept = identity, make(weight)
        weight.__dict__[_KEPT] = kept
    return kept[1]


def identify_tensors(weight: Packed) -> Identity:
    """Returns what changes when a weight's tensors move or are written to."""
    tensors = [tensor for tensor in weight._buffers.values() if tensor is not None]
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)


def stored_tensors(weight: Packed) -> dict[str, Tensor]:
    """Returns the tensors that a weight has, by name."""
    return {name: tensor for name, tensor in weight._buffers.items() if tensor is not None}
