"""Weights and exhaustive searches for the tests of codecs."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.codecs import CODECS
from runtime.formats import FORMATS

Array = NDArray[np.float64]


def _draw(rows: int, in_features: int) -> Tensor:
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(rows * 1000 + in_features))


def _with_outliers(rows: int, in_features: int) -> Tensor:
    weight = _draw(rows, in_features)
    weight[:, ::37] *= 30
    return weight


def _with_zeros(rows: int, in_features: int) -> Tensor:
    weight = _draw(rows, in_features)
    weight[0] = 0.0
    weight[-1, : in_features // 2] = -0.0
    return weight


WEIGHTS: dict[str, Callable[[int, int], Tensor]] = {
    "normal": _draw,
    "outliers": _with_outliers,
    "zeros": _with_zeros,
    "tiny": lambda rows, in_features: _draw(rows, in_features) * 1e-6,
    "large": lambda rows, in_features: _draw(rows, in_features) * 1e3,
    "positive": lambda rows, in_features: _draw(rows, in_features).abs() + 0.5,
    "columns": lambda rows, in_features: _draw(in_features, rows).T,
}


def encode(weight: Tensor, name: str, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the stored tensors of a weight."""
    return CODECS[FORMATS[name].kind].encode(weight, FORMATS[name], importance)


def render(weight: Tensor, name: str, importance: Tensor | None = None) -> Tensor:
    """Returns the weight as it is read back."""
    shape = (weight.shape[0], weight.shape[1])
    return CODECS[FORMATS[name].kind].decode(encode(weight, name, importance), FORMATS[name], shape, None)


def errors_by_group(weight: Tensor, rendered: Tensor, name: str, importance: Tensor | None = None) -> Array:
    """Returns the weighted squared error [rows, groups] in float64."""
    groups = FORMATS[name].group_count(weight.shape[1])
    h = np.ones(weight.shape[1]) if importance is None else importance.numpy().astype(np.float64)
    squares = h * (weight.numpy().astype(np.float64) - rendered.numpy().astype(np.float64)) ** 2
    sums: Array = squares.reshape(len(weight), groups, -1).sum(-1)
    return sums


def nearest(numbers: Array, values: Array) -> Array:
    """Returns for each number the nearest of all values, by looking at each."""
    finite = values[np.isfinite(values)]
    found: Array = finite[np.abs(numbers[..., None] - finite).argmin(-1)]
    return found
