"""The CPU kernels' views of packed weights, kept with the weights, and their execution layouts.

A view holds addresses alone: of the tensors as they are stored, or of an execution layout, which ``use_execution_``
makes of them. There are two: the tables of products by lookup (integers of few bits, beside the stored tensors, which
products of many tokens read), and levels (formats that are not integers but multiples of steps; without this layout
they are dequantized at every product). A layout is dropped when other numbers are loaded into the weight.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from runtime.codecs.levels import find_span, group_count, read_levels
from runtime.formats import Format
from runtime.kernels.cpu import CpuKernels
from runtime.kernels.matrices import (
    Levels,
    Matrix,
    Plane,
    StoredMatrix,
    describe_floats,
    describe_levels,
    describe_matrix,
)
from runtime.kernels.parted_weights import PARTED, Packed, find_parts
from runtime.packing import pack_codes
from runtime.stored_tensor import packed_row_bytes

_VIEW, _EXECUTION = "_matrix", "_execution"
_CPU = torch.device("cpu")
_ALIGNMENT_BYTES = 64
# Rows are made into levels so many weights at a time.
_BLOCK_WEIGHTS = 1 << 22


class _Execution(NamedTuple):
    """The execution layout of a weight, its view where it is levels, and the tensors that it was made from."""

    memory: Tensor
    levels: Matrix | None
    source: tuple[tuple[int, int], ...]


def find_planes(weight: Packed, device: torch.device) -> tuple[Plane, ...]:
    """Returns what the kernels multiply with to read a weight at its width; nothing where they cannot.

    Args:
        weight: The packed weight.
        device: Of the activations.
    """
    if weight.format.kind == PARTED:
        return find_parts(weight, device)
    matrix = find_matrix(weight, device)
    return () if matrix is None else (Plane(matrix),)


def find_matrix(weight: Packed, device: torch.device) -> Matrix | None:
    """Returns the kernels' view of a weight if it and ``device`` are the CPU and they know its format, else None.

    The view is kept with the weight, and made anew when its tensors have moved.
    """
    tensor = next(iter(weight._buffers.values()))
    if tensor is None or device.type != "cpu" or tensor.device.type != "cpu":
        return None
    execution = _find_execution(weight)
    if not has_kernel(weight.format):
        return None if execution is None else execution.levels
    kept: Matrix | None = weight.__dict__.get(_VIEW)
    if weight.format.kind == "float":
        if kept is None or kept.codes != tensor.data_ptr():
            if isinstance(tensor, FakeTensor) or not tensor.is_contiguous():
                return None
            kept = weight.__dict__[_VIEW] = describe_floats(tensor)
        return kept
    stored = stored_matrix(weight)
    if kept is None or kept.codes != stored.codes.data_ptr() or kept.scale != stored.scale.data_ptr():
        if isinstance(tensor, FakeTensor) or stored.scale.dtype != torch.float16 or not stored.codes.is_contiguous():
            return None
        kept = describe_matrix(stored, None if execution is None else execution.memory)
        weight.__dict__[_VIEW] = kept
    return kept


def stored_matrix(weight: Packed) -> StoredMatrix:
    """Returns the tensors of a weight of integers or of one bit."""
    tensors, format_ = weight._buffers, weight.format
    two_values = format_.kind == "binary"
    scale, zero_point = ("high", "low") if two_values and not format_.symmetric else ("scale", "zero_point")
    codes, scales = tensors["codes"], tensors[scale]
    assert codes is not None and scales is not None
    return StoredMatrix(codes, scales, tensors.get(zero_point), format_.bits, weight.shape[1], two_values)


def has_kernel(format_: Format) -> bool:
    """Returns True where the kernels read a format as it is stored: integers, one bit, 16-bit floating point."""
    return format_.kind == "float" or has_codes(format_)


def has_codes(format_: Format) -> bool:
    """Returns True for integers and one bit with scales in float16."""
    return format_.kind in ("int", "binary") and format_.scale_type == "fp16"


def execution_bytes(weight: Packed, kernels: CpuKernels) -> int:
    """Returns the bytes of a weight's execution layout; 0 where it has none, or is not on the CPU.

    Args:
        weight: The packed weight.
        kernels: Those that will read it.
    """
    matrix = find_matrix(weight, _CPU)
    if has_kernel(weight.format):
        return 0 if matrix is None else kernels.lookup_bytes(matrix)
    tensor = next(iter(weight._buffers.values()))
    if tensor is None or tensor.device.type != "cpu" or find_span(weight.format) is None:
        return 0
    codes, steps = _level_bytes(weight.format, weight.shape)
    return codes + 2 * steps


def use_execution_(weight: Packed, kernels: CpuKernels, memory: Tensor) -> None:
    """Lets the kernels read a weight in its execution layout, until other numbers are loaded into it.

    Args:
        weight: The packed weight, on the CPU.
        kernels: As ``execution_bytes`` had them.
        memory: ``execution_bytes(weight)`` bytes, uint8, all zero, aligned to 64; they are filled.
    """
    levels = None
    if has_kernel(weight.format):
        matrix = find_matrix(weight, _CPU)
        assert matrix is not None
        kernels.pack_lookup_(matrix, memory)
    else:
        levels = _make_levels(weight, memory)
    weight.__dict__[_EXECUTION] = _Execution(memory, levels, _identify(weight))
    weight.__dict__.pop(_VIEW, None)


def release_elsewhere_(weight: Packed) -> None:
    """Frees the execution layout of a weight that has left the CPU."""
    if any(tensor is not None and tensor.device.type != "cpu" for tensor in weight._buffers.values()):
        for name in (_EXECUTION, _VIEW):
            weight.__dict__.pop(name, None)


def _find_execution(weight: Packed) -> _Execution | None:
    found: _Execution | None = weight.__dict__.get(_EXECUTION)
    if found is None or found.source == _identify(weight):
        return found
    # Other numbers were loaded.
    for name in (_EXECUTION, _VIEW):
        weight.__dict__.pop(name, None)
    return None


def _identify(weight: Packed) -> tuple[tuple[int, int], ...]:
    """Where the tensors of a weight are, and how often each was written to."""
    tensors = (tensor for tensor in weight._buffers.values() if tensor is not None)
    return tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)


def _level_bits(format_: Format) -> int:
    span = find_span(format_)
    assert span is not None
    return (span[1] - span[0]).bit_length()


def _level_bytes(format_: Format, shape: tuple[int, int]) -> tuple[int, int]:
    """Returns the bytes of the codes and of the steps, each ending where the next may begin."""
    rows, columns = shape
    sizes = rows * packed_row_bytes(columns, _level_bits(format_)), 4 * rows * group_count(format_, columns)
    codes, steps = (-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in sizes)
    return codes, steps


def _make_levels(weight: Packed, memory: Tensor) -> Matrix:
    (rows, columns), format_ = weight.shape, weight.format
    bits, groups, span = _level_bits(format_), group_count(format_, columns), find_span(format_)
    assert span is not None
    sizes = _level_bytes(format_, weight.shape)
    parts = torch.split(memory, [sizes[0], sizes[1], sizes[1]])
    codes = parts[0][: rows * packed_row_bytes(columns, bits)].view(rows, -1)
    step, shift = (part.view(torch.float32)[: rows * groups].view(rows, groups) for part in parts[1:])
    each = max(1, _BLOCK_WEIGHTS // columns)
    for start in range(0, rows, each):
        block = slice(start, min(start + each, rows))
        # What is one for the whole weight has another length.
        tensors = {n: t[block] if len(t) == rows else t for n, t in weight._buffers.items() if t is not None}
        found = read_levels(tensors, format_, (block.stop - block.start, columns))
        codes[block] = pack_codes((found.levels - span[0]).to(torch.uint8), bits)
        step[block] = found.step
        shift[block] = -span[0] * found.step + (0.0 if found.least is None else found.least)
    return describe_levels(Levels(codes, step, shift, bits, columns))
