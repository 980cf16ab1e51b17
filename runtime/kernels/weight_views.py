"""The CPU kernels' views of packed weights, kept with the weights, and their execution layouts.

A view holds addresses alone: of the tensors as they are stored, or of an execution layout, which ``use_execution_``
makes of them. There are two kinds: the tables of products by lookup (integers of few bits, beside the stored tensors,
which products of many tokens read), and those of ``execution_layouts``, for formats that are dequantized at every
product without. A layout is dropped when other numbers are loaded into the weight.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from runtime.formats import Format
from runtime.kernels.cpu import CpuKernels
from runtime.kernels.execution_layouts import layout_bytes, make_layout
from runtime.kernels.matrices import Matrix, describe_floats, describe_matrix, sum_planes
from runtime.kernels.stored_planes import Packed, has_stored_planes, stored_planes

_VIEW, _EXECUTION = "_matrix", "_execution"
_CPU = torch.device("cpu")


class _View(NamedTuple):
    """The view of a weight as it is stored, the width that it is read at, and the tensors that it was made of."""

    matrix: Matrix
    width: int
    source: tuple[tuple[int, int], ...]


class _Execution(NamedTuple):
    """The execution layout of a weight, its view unless it is one of tables, and the tensors that it was made from."""

    memory: Tensor
    matrix: Matrix | None
    source: tuple[tuple[int, int], ...]


def find_matrix(weight: Packed, device: torch.device) -> Matrix | None:
    """Returns the kernels' view of a weight if it and ``device`` are the CPU and they know its format, else None.

    The view is kept with the weight, and made anew when its tensors have moved or were written to, or it is read
    at another width.

    Args:
        weight: The packed weight.
        device: Of the activations.
    """
    tensors = [tensor for tensor in weight._buffers.values() if tensor is not None]
    if not tensors or device.type != "cpu" or any(t.device.type != "cpu" or isinstance(t, FakeTensor) for t in tensors):
        return None
    execution = _find_execution(weight)
    if execution is not None and execution.matrix is not None:
        return execution.matrix
    if not reads_stored(weight.format):
        return None
    kept: _View | None = weight.__dict__.get(_VIEW)
    source = _identify(weight)
    if kept is None or kept.width != weight.width or kept.source != source:
        if not all(tensor.is_contiguous() for tensor in tensors):
            return None
        matrix = _describe(weight, None if execution is None else execution.memory)
        kept = weight.__dict__[_VIEW] = _View(matrix, weight.width, source)
    return kept.matrix


def reads_stored(format_: Format) -> bool:
    """Returns True where the kernels read a format as it is stored."""
    return format_.kind == "float" or has_stored_planes(format_)


def _describe(weight: Packed, lookup: Tensor | None) -> Matrix:
    """Returns the view of a weight as it is stored; only those of one plane have a layout for lookups."""
    if weight.format.kind == "float":
        (values,) = weight._buffers.values()
        assert values is not None
        return describe_floats(values)
    return sum_planes([describe_matrix(plane, lookup) for plane in stored_planes(weight)])


def execution_bytes(weight: Packed, kernels: CpuKernels) -> int:
    """Returns the bytes of a weight's execution layout; 0 where it has none, or is not on the CPU.

    Args:
        weight: The packed weight.
        kernels: Those that will read it.
    """
    if reads_stored(weight.format):
        matrix = find_matrix(weight, _CPU)
        # The bytes of several planes stay where they are: a layout of some would keep the others out of large pages.
        return 0 if matrix is None or matrix.next else kernels.lookup_bytes(matrix)
    tensor = next(iter(weight._buffers.values()))
    if tensor is None or tensor.device.type != "cpu":
        return 0
    return layout_bytes(weight.format, weight.shape, kernels)


def use_execution_(weight: Packed, kernels: CpuKernels, memory: Tensor) -> None:
    """Lets the kernels read a weight in its execution layout, until other numbers are loaded into it.

    Args:
        weight: The packed weight, on the CPU.
        kernels: As ``execution_bytes`` had them.
        memory: ``execution_bytes(weight)`` bytes, uint8, all zero, aligned to 64; they are filled.
    """
    matrix = None
    if reads_stored(weight.format):
        stored = find_matrix(weight, _CPU)
        assert stored is not None
        kernels.pack_lookup_(stored, memory)
    else:
        matrix = make_layout(weight, memory, kernels)
    weight.__dict__[_EXECUTION] = _Execution(memory, matrix, _identify(weight))
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
