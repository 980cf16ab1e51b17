"""Weights, input statistics and float64 references for the tests of quantizers."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.packed import PackedWeight
from runtime.quantization import QuantizedWeight, dequantize
from runtime.quantizers import InputStatistics
from runtime.quantizers.grid import Grid

Array = NDArray[np.float64]


def draw_weight(rows: int, in_features: int, seed: int = 0) -> Tensor:
    """Returns normal weights [rows, in_features]."""
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed))


def draw_statistics(
    in_features: int, *, inputs: int | None = None, seed: int = 0, dead: tuple[int, ...] = (), damping: float = 0.1
) -> InputStatistics:
    """Returns the statistics of correlated inputs with channels of many sizes; fewer inputs than channels lack rank."""
    generator = torch.Generator().manual_seed(seed + 1000)
    count = inputs if inputs is not None else 4 * in_features
    factors = torch.randn(count, 3, generator=generator) @ torch.randn(3, in_features, generator=generator)
    x = factors + 0.5 * torch.randn(count, in_features, generator=generator)
    x *= torch.exp(0.7 * torch.randn(in_features, generator=generator))
    x[:, list(dead)] = 0.0
    return InputStatistics(second_moment=x.T @ x, count=count, damping=damping)


def to_float64(tensor: Tensor) -> Array:
    """Returns a tensor as a float64 array."""
    array: Array = tensor.numpy().astype(np.float64)
    return array


def errors_by_row(quantized: QuantizedWeight, weight: Tensor, statistics: InputStatistics) -> Array:
    """Returns d H d' [rows] in float64."""
    difference = to_float64(dequantize(quantized)) - to_float64(weight)
    H = to_float64(statistics.hessian())
    errors: Array = np.einsum("ri,ij,rj->r", difference, H, difference)
    return errors


def expand(grid: Grid, in_features: int) -> tuple[Array, Array]:
    """Returns scale and zero point of every weight, both [rows, in_features] float64."""
    length = in_features // grid.scale.shape[1]
    return (
        to_float64(grid.scale.float().repeat_interleave(length, dim=1)),
        to_float64(grid.zero_point.repeat_interleave(length, dim=1)),
    )


def assert_storable(quantized: QuantizedWeight, shape: tuple[int, int]) -> None:
    """Asserts that packing keeps every number, in exactly the bytes that the format is priced at."""
    format_ = quantized.format
    groups = format_.group_count(shape[1])
    top = (1 << format_.bits) - 1
    assert (quantized.codes.dtype, tuple(quantized.codes.shape)) == (torch.uint8, shape)
    assert int(quantized.codes.max()) <= top
    assert (quantized.scale.dtype, tuple(quantized.scale.shape)) == (torch.float16, (shape[0], groups))
    assert bool((quantized.scale > 0).all())
    assert bool(torch.isfinite(quantized.scale).all())
    if format_.symmetric:
        assert quantized.zero_point is None
    else:
        assert quantized.zero_point is not None
        assert (quantized.zero_point.dtype, tuple(quantized.zero_point.shape)) == (torch.uint8, (shape[0], groups))
        assert int(quantized.zero_point.max()) <= top
    packed = PackedWeight.from_quantized(quantized)
    assert torch.equal(packed(), dequantize(quantized))
    assert sum(buffer.nbytes for buffer in packed.buffers()) == format_.storage_bytes(shape)
