"""Finished pieces of a measurement: small files of arrays, written whole or not at all, that a second run takes up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from runtime.files import atomic_path

Piece = dict[str, NDArray[Any]]


def read_or_measure(path: Path | None, measure: Callable[[], Piece]) -> Piece:
    """Returns the arrays of a piece: those of its file, or measured and written to it where it is absent or damaged.

    Args:
        path: Its file; None to keep nothing.
        measure: Measures the piece.
    """
    piece = None if path is None else _read(path)
    if piece is None:
        piece = measure()
        if path is not None:
            _write(path, piece)
    return piece


def _read(path: Path) -> Piece | None:
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None


def _write(path: Path, piece: Piece) -> None:
    with atomic_path(path) as temporary:
        save_file({name: np.ascontiguousarray(array) for name, array in piece.items()}, temporary)
