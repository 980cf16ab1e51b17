"""How fast one thread reads memory: a compiled loop that does nothing else, the best of some ways of prefetching."""

import ctypes
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

from runtime.kernels.build import find_compiler

# Bytes ahead and level of the prefetch; none for 0. Which is best differs from machine to machine.
WAYS = ((0, 0), (2048, 2), (4096, 2), (2048, 3))
_SOURCE = """
#include <stdint.h>
template <int AHEAD, int LEVEL> static int64_t read(const int64_t* p, int64_t n) {
  int64_t sums[64] = {};
  for (int64_t i = 0; i < n; i += 64) {
    if (AHEAD)
      for (int j = 0; j < 64; j += 8) __builtin_prefetch(reinterpret_cast<const char*>(p + i + j) + AHEAD, 0, LEVEL);
    for (int j = 0; j < 64; ++j) sums[j] ^= p[i + j];
  }
  int64_t all = 0;
  for (int64_t sum : sums) all ^= sum;
  return all;
}
"""


def compile_reads(directory: Path) -> dict[str, Callable[[Tensor], int]]:
    """Returns functions that read a tensor of int64, a multiple of 64 numbers, each in its way.

    Args:
        directory: Where the library is put.
    """
    source = directory / "read.cpp"
    exported = (
        f'extern "C" int64_t read_{i}(const int64_t* p, int64_t n) {{ return read<{ahead}, {level}>(p, n); }}\n'
        for i, (ahead, level) in enumerate(WAYS)
    )
    source.write_text(_SOURCE + "".join(exported), encoding="utf-8")
    compiler = find_compiler()
    assert compiler is not None, "a C++ compiler must be there"
    library_path = directory / "read.so"
    flags = ("-std=c++17", "-O3", "-funroll-loops", "-march=native", "-mprefer-vector-width=512", "-shared", "-fPIC")
    subprocess.run([compiler, *flags, str(source), "-o", str(library_path)], check=True)
    library = ctypes.CDLL(str(library_path))
    return {f"read {i}": partial(_read, getattr(library, f"read_{i}")) for i in range(len(WAYS))}


def _read(function: Callable[..., int], memory: Tensor) -> int:
    return function(ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(memory.numel()))
