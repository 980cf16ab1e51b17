"""What the compiled CPU kernels see of a weight: addresses and sizes, `bitplan::Matrix` of `cpu/packed_matrix.h`.

    weight = sum over planes of factor * (their codes with their scales)

Most weights are one plane; those of several are products that are added up, each plane read as a weight of its kind is.
A plane may have some of the weight's columns alone.
"""

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

# As many as the library makes room for.
MOST_PLANES = 8
_NULL = 0
# What codes are, by the number the library knows it under.
_FLOATS = {torch.bfloat16: 1, torch.float16: 2}
_ELEMENTS = {"int": 0, "two_values": 3, "levels": 4, "e4m3": 5, "e5m2": 6, "sparse": 7, "scaled_float16": 8}
_SCALE_TYPES = {torch.float16: 0, torch.uint8: 1, torch.float32: 2}


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
        ("scale_type", ctypes.c_int32),
        ("centre", ctypes.c_float),
        ("factor", ctypes.c_float),
        ("index", ctypes.c_uint64),
        ("inputs", ctypes.c_int64),
        ("next", ctypes.c_uint64),
    )


class ColumnPart(NamedTuple):
    """Which columns of a weight a plane has, [columns] int32, and how many the weight has."""

    columns: Tensor
    inputs: int


class StoredMatrix(NamedTuple):
    """A weight, or a plane of one, in its stored layout, as ``reference.dequantize_stored`` documents it.

    Codes are integers; or ``element`` is "two_values": one bit chooses between two values of its group, ``scale`` holds
    the higher ones and ``zero_point`` the lower ones in float16; or it is the name of a float of 8 bits, or
    "scaled_float16", whose scales may be powers of two in E8M0, or float32, too. ``centre`` is the zero point of all
    groups where these have none, None for 2**(bits - 1); all is multiplied by ``factor``. ``part`` is there where these
    are some of the weight's columns.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    columns: int
    element: str = "int"
    centre: float | None = None
    factor: float = 1.0
    part: ColumnPart | None = None


def sum_planes(planes: Sequence[Matrix]) -> Matrix:
    """Returns the view of the sum of some planes of a weight: the first, behind which the others are found."""
    assert 0 < len(planes) <= MOST_PLANES
    for plane, following in pairwise(planes):
        plane.next, plane.following = ctypes.addressof(following), following
    return planes[0]


def describe_matrix(stored: StoredMatrix, lookup: Tensor | None = None) -> Matrix:
    """Returns the library's view of a weight or plane; valid while its tensors are.

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
    matrix = Matrix(
        codes=stored.codes.data_ptr(),
        scale=stored.scale.data_ptr(),
        zero_point=_NULL if stored.zero_point is None else stored.zero_point.data_ptr(),
        rows=rows,
        columns=stored.columns,
        bits=stored.bits,
        group_size=stored.columns // groups,
        lookup=_NULL if lookup is None else lookup.data_ptr(),
        element=_ELEMENTS[stored.element],
        scale_type=_SCALE_TYPES[stored.scale.dtype],
        centre=float(1 << (stored.bits - 1)) if stored.centre is None else stored.centre,
        factor=stored.factor,
        index=_NULL if stored.part is None else stored.part.columns.data_ptr(),
        inputs=stored.columns if stored.part is None else stored.part.inputs,
    )
    matrix.lookup_memory, matrix.part = lookup, stored.part
    return matrix


def describe_floats(values: Tensor) -> Matrix:
    """Returns the library's view of a weight [rows, columns] in bfloat16 or float16; valid while the tensor is."""
    rows, columns = values.shape
    return Matrix(
        codes=values.data_ptr(),
        rows=rows,
        columns=columns,
        bits=16,
        group_size=columns,
        element=_FLOATS[values.dtype],
        factor=1.0,
        inputs=columns,
    )


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
    matrix = Matrix(
        codes=levels.codes.data_ptr(),
        scale=levels.step.data_ptr(),
        zero_point=levels.shift.data_ptr(),
        rows=rows,
        columns=levels.columns,
        bits=levels.bits,
        group_size=levels.columns // groups,
        element=_ELEMENTS["levels"],
        factor=1.0,
        inputs=levels.columns,
    )
    matrix.levels = levels
    return matrix


def describe_sparse(index: Tensor, value: Tensor, columns: int) -> Matrix:
    """Returns the library's view of a weight of few numbers, the others zero; valid while the tensors are.

    Args:
        index: [rows, count] int32, the columns of the numbers of each row.
        value: [rows, count] float32.
        columns: Of the weight.
    """
    rows, count = index.shape
    return Matrix(
        codes=index.data_ptr(),
        scale=value.data_ptr(),
        rows=rows,
        columns=columns,
        group_size=count,
        element=_ELEMENTS["sparse"],
        factor=1.0,
        inputs=columns,
    )
