"""What the compiled CPU kernels see of a weight: addresses and sizes, `bitplan::Matrix` of `cpu/packed_matrix.h`."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_NULL = 0
# What codes are, by the number the library knows it under.
_INTEGER, _FLOATS, _BINARY, _LEVELS = 0, {torch.bfloat16: 1, torch.float16: 2}, 3, 4


class Matrix(ctypes.Structure):
    """``bitplan::Matrix``; addresses are plain integers, so that a module that holds one can be copied."""

    _fields_ = (
        ("codes", ctypes.c_uint64),
        ("scale", ctypes.c_uint64),
        ("zero_point", ctypes.c_uint64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
        ("lookup", ctypes.c_uint64),
        ("element", ctypes.c_int32),
    )


class StoredMatrix(NamedTuple):
    """A weight in its stored layout, as ``runtime.kernels.reference.dequantize_stored`` documents it.

    Where ``two_values``, one bit chooses between two values of its group: ``scale`` holds the higher ones, and
    ``zero_point`` the lower ones in float16, or None where these are minus the higher ones.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    columns: int
    two_values: bool = False


class Plane(NamedTuple):
    """A part of a weight; the weight is the sum of its parts, each times its factor, that of the first being one."""

    matrix: Matrix
    factor: float = 1.0


def add_planes(products: Sequence[Tensor], planes: Sequence[Plane]) -> Tensor:
    """Returns the product with a weight, made of those with its parts in place of the first."""
    for product, plane in zip(products[1:], planes[1:], strict=True):
        products[0].add_(product, alpha=plane.factor)
    return products[0]


def describe_matrix(stored: StoredMatrix, lookup: Tensor | None = None) -> Matrix:
    """Returns the library's view of a weight; valid while its tensors are.

    Args:
        stored: The weight.
        lookup: The same in its execution layout, see ``CpuKernels.pack_lookup_``, which the view keeps; or None.

    Raises:
        ValueError: If a tensor is not contiguous on the CPU.
    """
    tensors = [t for t in (stored.codes, stored.scale, stored.zero_point) if t is not None]
    if not all(t.is_contiguous() and t.device.type == "cpu" for t in tensors):
        msg = (
            "the tensors of a packed weight must be contiguous on the CPU: got devices "
            f"{[str(t.device) for t in tensors]}, strides {[t.stride() for t in tensors]}. Load the checkpoint again."
        )
        raise ValueError(msg)
    rows, groups = stored.scale.shape
    zero_point = _NULL if stored.zero_point is None else stored.zero_point.data_ptr()
    addresses = stored.codes.data_ptr(), stored.scale.data_ptr(), zero_point
    place = _NULL if lookup is None else lookup.data_ptr()
    element = _BINARY if stored.two_values else _INTEGER
    matrix = Matrix(*addresses, rows, stored.columns, stored.bits, stored.columns // groups, place, element)
    matrix.lookup_memory = lookup
    return matrix


def describe_floats(values: Tensor) -> Matrix:
    """Returns the library's view of a weight [rows, columns] in bfloat16 or float16; valid while the tensor is."""
    rows, columns = values.shape
    return Matrix(values.data_ptr(), _NULL, _NULL, rows, columns, 16, columns, _NULL, _FLOATS[values.dtype])


class Levels(NamedTuple):
    """A weight as levels: weight = step * code - shift.

    codes [rows, ceil(columns * bits / 8)] uint8, as ``pack_codes`` packs them; step and shift [rows, groups] float32.
    """

    codes: Tensor
    step: Tensor
    shift: Tensor
    bits: int
    columns: int


def describe_levels(levels: Levels) -> Matrix:
    """Returns the library's view of a weight as levels, all of it contiguous on the CPU; the view keeps the tensors."""
    rows, groups = levels.step.shape
    addresses = levels.codes.data_ptr(), levels.step.data_ptr(), levels.shift.data_ptr()
    matrix = Matrix(*addresses, rows, levels.columns, levels.bits, levels.columns // groups, _NULL, _LEVELS)
    matrix.levels = levels
    return matrix
