"""llama.cpp itself: the library inside the wheel xllamacpp, or another, called through its C interface.

The wheel exports the functions of ``llama.h`` but no way to logits in Python. Parameter structures are passed by value
and grow from version to version; only their first fields are read here, so they are declared longer than they are. The
calling conventions of x86-64 and AArch64 let a callee read the beginning of a longer structure.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_LONGER = 1024


class _Params(ctypes.Structure):
    """llama_model_params or llama_context_params; of the latter the first four numbers are named."""

    _fields_ = [
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * _LONGER),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_POINTERS = {
    "llama_model_load_from_file": [ctypes.c_char_p, _Params],
    "llama_init_from_model": [ctypes.c_void_p, _Params],
    "llama_model_get_vocab": [ctypes.c_void_p],
    "llama_get_memory": [ctypes.c_void_p],
}


@_LOG
def _silent(_level: int, _text: bytes, _data: object) -> None:
    pass


def wheel_library() -> Path:
    """Returns the library inside the wheel."""
    found = find_spec("xllamacpp")
    assert found is not None and found.origin is not None, "install the extra 'test'"
    (path,) = Path(found.origin).parent.glob("xllamacpp*.so")
    return path


@cache
def _library(path: Path | None) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path or wheel_library()))
    for name, arguments in _POINTERS.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = ctypes.c_void_p
    library.llama_model_default_params.restype = _Params
    library.llama_context_default_params.restype = _Params
    library.llama_batch_init.restype = _Batch
    library.llama_decode.argtypes = [ctypes.c_void_p, _Batch]
    library.llama_get_logits.argtypes = [ctypes.c_void_p]
    library.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    for name in ("llama_free", "llama_model_free", "llama_vocab_n_tokens"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    library.llama_memory_clear.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    library.llama_set_n_threads.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
    library.llama_batch_free.argtypes = [_Batch]
    library.llama_print_system_info.restype = ctypes.c_char_p
    library.llama_log_set(_silent, None)
    library.llama_backend_init()
    return library


def instruction_sets(library: Path | None = None) -> str:
    """Returns what llama.cpp says of the instructions that it was compiled for."""
    return str(_library(library).llama_print_system_info().decode())


class LlamaCpp:
    """A GGUF file loaded by llama.cpp."""

    def __init__(self, library: ctypes.CDLL, model: int, context: int) -> None:
        self._library, self._context = library, context
        self._vocabulary = library.llama_model_get_vocab(model)
        self.vocabulary_size = int(library.llama_vocab_n_tokens(self._vocabulary))

    def logits(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Returns the logits [T, vocabulary] of a sequence of tokens [T]."""
        return self.append(tokens, past=0, wanted=len(tokens))

    def append(self, tokens: NDArray[np.int64], *, past: int, wanted: int = 1) -> NDArray[np.float32]:
        """Returns the logits [wanted, vocabulary] of the last of some tokens behind ``past`` others; 0 begins anew."""
        library = self._library
        if past == 0:
            library.llama_memory_clear(library.llama_get_memory(self._context), True)
        batch = library.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), past + i, 1
            batch.logits[i] = len(tokens) - i <= wanted
            batch.seq_id[i][0] = 0
        code = library.llama_decode(self._context, batch)
        library.llama_batch_free(batch)
        assert code == 0, f"llama_decode returned {code}"
        pointer = library.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, (wanted, self.vocabulary_size)).copy()

    def tokenize(self, text: str) -> list[int]:
        """Returns the tokens of a text, special ones at its ends included."""
        octets = text.encode()
        tokens = (ctypes.c_int32 * (len(octets) + 8))()
        arguments = (ctypes.c_void_p(self._vocabulary), octets, len(octets), tokens, len(tokens), True, True)
        return list(tokens[: self._library.llama_tokenize(*arguments)])


@contextmanager
def loaded(
    path: Path, *, context_tokens: int = 512, threads: int = 1, library_path: Path | None = None
) -> Iterator[LlamaCpp]:
    """Gives a GGUF file loaded by llama.cpp: by its library at ``library_path``, or else by the wheel's."""
    library = _library(library_path)
    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    params = library.llama_context_default_params()
    params.n_ctx = context_tokens
    context = library.llama_init_from_model(model, params)
    library.llama_set_n_threads(context, threads, threads)
    try:
        yield LlamaCpp(library, model, context)
    finally:
        library.llama_free(context)
        library.llama_model_free(model)
