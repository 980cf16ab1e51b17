"""The product of activations with a packed weight whose columns have two widths, each part read at its own."""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.codecs.column_mixture import list_column_parts, part_of, read_column_mask
from runtime.kernels.triton.column_linear import ColumnParts, column_linear
from runtime.kernels.triton.kept_layout import Packed, find_kept, stored_tensors
from runtime.kernels.triton.packed_fragments import make_fragments
from runtime.storage import Format


@dataclass(kw_only=True)
class _Part:
    """Some columns of a packed weight, which are a packed weight by themselves."""

    format: Format
    width: int
    shape: tuple[int, int]
    _buffers: dict[str, Tensor | None]


def multiply_columns(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor | None:
    """Returns x W' + bias in the type of x; None if a scale is no float16 number.

    Args:
        x: [..., in_features] float16, bfloat16 or float32.
        weight: A packed weight of kind ``column_mixture``.
        bias: [out_features], or None.
    """
    parts = find_kept(weight, make_column_parts)
    return None if parts is None else column_linear(x, parts, bias)


def make_column_parts(weight: Packed) -> ColumnParts | None:
    """Returns the parts of a mixture in the kernels' layout; None if a scale is no float16 number."""
    tensors = stored_tensors(weight)
    listed = list_column_parts(weight.format, read_column_mask(tensors, weight.shape))
    made = [
        make_fragments(
            _Part(
                format=part,
                width=part.bits,
                shape=(weight.shape[0], len(columns)),
                _buffers=dict(part_of(tensors, name)),
            )
        )
        for name, part, columns in listed
    ]
    fragments = tuple(part for part in made if part is not None)
    if len(fragments) < len(made):
        return None
    return ColumnParts(columns=torch.cat([columns for _, _, columns in listed]), parts=fragments)
