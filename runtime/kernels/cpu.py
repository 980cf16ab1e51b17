"""The compiled CPU kernels, called through ctypes.

The kernels read weights in their stored layout, so there need be no execution copy of a weight, and ``state_dict`` has
nothing to convert. They are described in ``cpu/packed_matrix.h``. Activations are rounded to 16 bits within every
group (128 columns where a row is one group), products are exact integers, sums float32: relative error about 4e-5.

Up to 3 bits, and few tokens, there is a faster way with AVX-512: an execution layout (``cpu/lookup.h``) whose products
are sums out of tables, of activations of 15 bits: relative error about 9e-5.

Weights in bfloat16, float16 or floats of 8 bits become float32 as they are read, and nothing is rounded but sums.
"""

import ctypes
import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.kernels.build import CompilationFailed, compile_library, library_path
from runtime.kernels.matrices import Matrix

# Instruction sets, by the number the library knows them under.
LEVELS = ("portable", "avx2", "avx512")
_NULL = 0


class _Product(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_uint64),
        ("x", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("bias", ctypes.c_uint64),
        ("tokens", ctypes.c_int64),
    )


class Product(NamedTuple):
    """One product x W' + bias, float32: x [tokens, columns] contiguous, bias [rows]."""

    x: Tensor
    weight: Matrix
    bias: Tensor | None = None


class CpuKernels:
    """The library at one instruction set.

    Args:
        library: The loaded library.
        level: Name in ``LEVELS`` that this processor has.
    """

    def __init__(self, library: ctypes.CDLL, level: str) -> None:
        self.level = level
        self._level = LEVELS.index(level)
        self._multiply = library.bitplan_multiply
        self._multiply.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
        self._dequantize = library.bitplan_dequantize
        self._dequantize.restype = None
        self._dequantize.argtypes = (*[ctypes.c_void_p] * 2, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int)
        self._lookup_bytes = library.bitplan_lookup_bytes
        self._lookup_bytes.restype = ctypes.c_int64
        self._lookup_bytes.argtypes = (ctypes.c_void_p, ctypes.c_int)
        self._pack_lookup = library.bitplan_pack_lookup
        self._pack_lookup.restype = None
        self._pack_lookup.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
        self._step = library.bitplan_step
        self._step.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)

    def multiply(self, products: Sequence[Product]) -> list[Tensor]:
        """Returns float32 [tokens, rows] of every product; all are computed in one call, rows shared among threads.

        Raises:
            MemoryError: If there is no memory for the rounded activations.
        """
        outs, run = self.prepare(products)
        run()
        return outs

    def prepare(self, products: Sequence[Product]) -> tuple[list[Tensor], Callable[[], None]]:
        """Returns where the products will be, as ``multiply`` returns them, and the call that computes them.

        The call keeps what it reads and writes; the weights' own tensors must outlive it.
        """
        outs = [torch.empty((p.x.shape[0], p.weight.rows), dtype=torch.float32) for p in products]
        jobs = (_Product * len(products))()
        for job, product, out in zip(jobs, products, outs, strict=True):
            job.weight, job.x, job.out = ctypes.addressof(product.weight), product.x.data_ptr(), out.data_ptr()
            job.bias = _NULL if product.bias is None else product.bias.data_ptr()
            job.tokens = product.x.shape[0]

        def run(_kept: object = (products, outs)) -> None:
            self._run(jobs, len(products))

        return outs, run

    def multiply_one(self, x: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
        """Returns float32 [..., rows] of one product; the way with the least to do around it.

        Args:
            x: [..., columns] float32, contiguous.
            weight: The weight [rows, columns].
            bias: [rows] float32, contiguous, or None.

        Raises:
            MemoryError: If there is no memory for the rounded activations.
        """
        *leading, columns = x.shape
        out = torch.empty((*leading, weight.rows), dtype=torch.float32)
        bias_address = _NULL if bias is None else bias.data_ptr()
        job = _Product(ctypes.addressof(weight), x.data_ptr(), out.data_ptr(), bias_address, x.numel() // columns)
        self._run(ctypes.byref(job), 1)
        return out

    def _run(self, jobs: Any, count: int) -> None:
        if self._multiply(jobs, count, self._level, torch.get_num_threads()):
            msg = f"memory for the activations of {count} products must be there. Use shorter prompts."
            raise MemoryError(msg)

    def dequantize(self, weight: Matrix, rows: Tensor | None = None) -> Tensor:
        """Returns the float32 matrix, or the given rows of it; the same numbers as the reference.

        Args:
            weight: The weight.
            rows: [n] int64 indices below its rows, contiguous, or None for all.
        """
        count = weight.rows if rows is None else rows.shape[0]
        out = torch.empty((count, weight.inputs), dtype=torch.float32)
        indices = _NULL if rows is None else rows.data_ptr()
        self._dequantize(ctypes.addressof(weight), indices, count, out.data_ptr(), torch.get_num_threads())
        return out

    def lookup_bytes(self, weight: Matrix) -> int:
        """Returns the bytes of a weight in the layout of ``cpu/lookup.h``; 0 where the kernels have none for it."""
        return int(self._lookup_bytes(ctypes.addressof(weight), self._level))

    def pack_lookup_(self, weight: Matrix, memory: Tensor) -> None:
        """Writes a weight in the layout of ``cpu/lookup.h``.

        Args:
            weight: The weight; ``lookup_bytes`` of it is not 0.
            memory: So many bytes, all zero, aligned to 64.
        """
        self._pack_lookup(ctypes.addressof(weight), memory.data_ptr(), torch.get_num_threads())

    def step(self, decoder: ctypes.Structure, step: ctypes.Structure) -> None:
        """Runs a whole decoder over some tokens, see ``runtime.kernels.decoder_step``.

        Raises:
            MemoryError: If there is no memory for the states of the tokens.
        """
        if self._step(ctypes.addressof(decoder), ctypes.addressof(step), self._level, torch.get_num_threads()):
            msg = "memory for the states of the tokens must be there. Use shorter prompts."
            raise MemoryError(msg)


@functools.cache
def load_kernels(level: str | None = None) -> CpuKernels | None:
    """Returns the kernels, compiled now if need be; None, with a warning, where they cannot be had.

    Args:
        level: Name in ``LEVELS``; None for the best that this processor has.

    Raises:
        ValueError: If the processor does not have the level.
    """
    library = _load_library()
    if library is None:
        return None
    has = LEVELS[: library.bitplan_best_level() + 1]
    if level is not None and level not in has:
        msg = f"the instruction set must be one that this processor has: got '{level}', it has {', '.join(has)}."
        raise ValueError(msg)
    return CpuKernels(library, level or has[-1])


@functools.cache
def _load_library() -> ctypes.CDLL | None:
    path = library_path()
    try:
        if not path.exists():
            _compile_once(path)
        return ctypes.CDLL(str(path))
    except (CompilationFailed, OSError) as error:
        warnings.warn(
            "packed weights run on the slow reference path, tens of times slower: the CPU kernels cannot be had. "
            f"{error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _compile_once(target: Path) -> None:
    """Compiles the library unless another process does so at this moment; then waits for that one."""
    if sys.platform == "win32":
        # No locks of this kind there: two processes may compile the same file, and the last one stays.
        compile_library(target)
        return
    import fcntl

    try:
        lock = (target.parent / ".build.lock").open("w")
    except OSError as error:
        msg = f"the library's directory must be writable: got '{target.parent}', {error.strerror}."
        raise CompilationFailed(msg) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            compile_library(target)
