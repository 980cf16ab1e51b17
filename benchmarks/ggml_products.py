"""Products of one matrix and one vector by ggml, llama.cpp's library of kernels, called through its C interface."""

import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

# Numbers of enum ggml_type in ggml.h.
TYPES = {"q2_K": 10, "q3_K": 11, "q4_0": 2, "q4_K": 12, "q5_0": 6, "q6_K": 14, "q8_0": 8}
_F32 = 0
_OVERHEAD_BYTES = 1 << 20


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _Plan(ctypes.Structure):
    """ggml_cplan, of which the first two fields are named; longer than it is."""

    _fields_ = (("work_size", ctypes.c_size_t), ("work_data", ctypes.c_void_p), ("rest", ctypes.c_uint8 * 256))


class GgmlProducts:
    """Calls of ggml_mul_mat.

    Args:
        library: A library that ggml is in or that depends on it.
    """

    def __init__(self, library: Path) -> None:
        self._ggml = ctypes.CDLL(str(library))
        self._ggml.ggml_graph_plan.restype = _Plan
        for name in ("ggml_row_size", "ggml_quantize_chunk", "ggml_graph_overhead"):
            getattr(self._ggml, name).restype = ctypes.c_size_t
        for name in ("ggml_init", "ggml_new_tensor_2d", "ggml_mul_mat", "ggml_new_graph", "ggml_get_data"):
            getattr(self._ggml, name).restype = ctypes.c_void_p
        self._ggml.ggml_cpu_init()
        self._kept: list[object] = []

    def weight_bytes(self, name: str, shape: tuple[int, int]) -> int:
        """Returns the bytes of a matrix in a type."""
        rows, columns = shape
        return rows * int(self._ggml.ggml_row_size(TYPES[name], ctypes.c_int64(columns)))

    def prepare(
        self, name: str, weight: Tensor, x: Tensor, counts: tuple[int, int], reserve: Callable[[int], Tensor]
    ) -> list[Callable[[], int]]:
        """Returns calls that compute x W' on one thread, each time with a copy of its own of W in a type of ggml.

        Args:
            name: The type, in ``TYPES``.
            weight: [rows, columns] float32, contiguous.
            x: [1, columns] float32.
            counts: How many calls, and how many products in each.
            reserve: Returns so many bytes of memory.
        """
        ggml, (rows, columns) = self._ggml, weight.shape
        size = counts[0] * counts[1] * (self.weight_bytes(name, (rows, columns)) + _OVERHEAD_BYTES)
        memory = reserve(size)
        context = ctypes.c_void_p(ggml.ggml_init(_InitParams(size, memory.data_ptr(), False)))
        self._kept.append(memory)
        calls = []
        first: ctypes.c_void_p | None = None
        for _ in range(counts[0]):
            graph = ctypes.c_void_p(ggml.ggml_new_graph(context))
            for _ in range(counts[1]):
                sizes = ctypes.c_int64(columns), ctypes.c_int64(rows)
                matrix = ctypes.c_void_p(ggml.ggml_new_tensor_2d(context, TYPES[name], *sizes))
                vector = ctypes.c_void_p(ggml.ggml_new_tensor_2d(context, _F32, sizes[0], ctypes.c_int64(1)))
                place = ctypes.c_void_p(ggml.ggml_get_data(matrix))
                first = first or self._quantize(name, weight, place)
                if place.value != first.value:
                    ctypes.memmove(place, first, self.weight_bytes(name, (rows, columns)))
                ctypes.memmove(ggml.ggml_get_data(vector), x.data_ptr(), 4 * columns)
                ggml.ggml_build_forward_expand(graph, ctypes.c_void_p(ggml.ggml_mul_mat(context, matrix, vector)))
            plan = ggml.ggml_graph_plan(graph, 1, None)
            work = torch.empty(plan.work_size + 64, dtype=torch.uint8)
            plan.work_data = work.data_ptr()
            self._kept += [work, plan]
            calls.append(partial(ggml.ggml_graph_compute, graph, ctypes.byref(plan)))
        return calls

    def _quantize(self, name: str, weight: Tensor, place: ctypes.c_void_p) -> ctypes.c_void_p:
        """Writes the matrix in a type and returns where."""
        rows, columns = weight.shape
        chunk = (ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(columns), None)
        self._ggml.ggml_quantize_chunk(TYPES[name], ctypes.c_void_p(weight.data_ptr()), place, *chunk)
        return place
