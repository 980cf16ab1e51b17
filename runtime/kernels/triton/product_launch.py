"""What the products with packed weights have in common: by rows of x, how they are computed, launched and split.

Up to 64 rows are multiplied by the codes as they are. For more rows the weight is dequantized first, a block of its
rows at a time, and multiplied by the library's GEMM: then the time is that of arithmetic, and the weight is the very
one that the reference multiplies by. float32 activations are multiplied by the codes at any number of rows, as two
float16 rows each (``row_scaling_kernel``).
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from runtime.kernels.triton.devices import DEVICES, Device
from runtime.kernels.triton.fragment_layout import TILE_CODES
from runtime.kernels.triton.launch_table import MOST_ROWS, Launch
from runtime.kernels.triton.row_scaling import scale_rows, sum_parts
from runtime.kernels.triton.weight_only_kernel import sum_splits_kernel

# Whether kernels run in Triton's interpreter: fixed when they are defined, for the life of the process.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_SUM_BLOCK = 1024
# Rows of the weight that are dequantized at once: bounds the memory to 4096 x K floats.
_DEQUANTIZED_ROWS = 4096

Dequantize = Callable[[torch.dtype, tuple[int, int]], Tensor]


class MultiplyFew(Protocol):
    """Returns 2**exponent x W' + bias, [M, N] in ``out_dtype``, for up to 64 rows of x.

    x is [M, in_features padded to a multiple of 64], float16 or bfloat16; the exponent [M] int32, or None for 0.
    """

    def __call__(
        self, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype, exponent: Tensor | None = None
    ) -> Tensor: ...


def multiply_rows(
    x: Tensor,
    bias: Tensor | None,
    *,
    out_features: int,
    scaled: bool,
    few: MultiplyFew,
    dequantize: Dequantize,
) -> Tensor:
    """Returns x W' + bias, [rows, out_features] in the type of x, for any number of rows.

    Args:
        x: [rows, in_features] float16, bfloat16 or float32.
        bias: [out_features], or None.
        out_features: Rows of the weight.
        scaled: bfloat16 does not hold the codes: few rows are multiplied as scaled rows.
        few: The product of few rows.
        dequantize: (float16 or bfloat16, (first, last) rows, the first a multiple of 8) -> these rows of the weight.
    """
    if x.dtype == torch.float32:
        y = _multiply_float32(x, out_features, few)
        return y if bias is None else y + bias
    if x.shape[0] > MOST_ROWS:
        return _multiply_many(x, bias, out_features, dequantize)
    if scaled:
        rows = scale_rows(x)
        return few(rows.values[0], bias, x.dtype, rows.exponent[0])
    return few(pad_rows(x), bias, x.dtype)


def pad_rows(x: Tensor) -> Tensor:
    """Returns x [rows, in_features] with zeros up to a multiple of 64, contiguous."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % TILE_CODES)).contiguous()


def _multiply_many(x: Tensor, bias: Tensor | None, N: int, dequantize: Dequantize) -> Tensor:
    y = torch.empty((x.shape[0], N), dtype=x.dtype, device=x.device)
    for first in range(0, N, _DEQUANTIZED_ROWS):
        last = min(N, first + _DEQUANTIZED_ROWS)
        part = None if bias is None else bias[first:last].to(x.dtype)
        y[:, first:last] = torch.nn.functional.linear(x, dequantize(x.dtype, (first, last)), part)
    return y


def _multiply_float32(x: Tensor, N: int, few: MultiplyFew) -> Tensor:
    scaled = scale_rows(x)
    parts, exponents = scaled.values.flatten(0, 1), scaled.exponent.flatten()
    pieces = []
    for first in range(0, max(1, parts.shape[0]), MOST_ROWS):
        some = slice(first, first + MOST_ROWS)
        pieces.append(few(parts[some], None, torch.float32, exponents[some]))
    return sum_parts(torch.cat(pieces).view(2, x.shape[0], N))


def multiply_split(
    launch_splits: Callable[[Tensor, Tensor | None], None],
    bias: Tensor | None,
    *,
    splits: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Returns a product [M, N] of so many addends, and its bias.

    Args:
        launch_splits: (out, bias) -> None, writes the addends and the bias to out [splits, M, N]; without bias, and in
            float32, where there are several.
        bias: [N], or None.
        splits: How many addends.
        shape: (M, N).
        dtype: Type of the product.
        device: Where it is computed.
    """
    y = torch.empty(shape, dtype=dtype, device=device)
    if shape[0] == 0:
        return y
    if splits == 1:
        launch_splits(y.unsqueeze(0), bias)
        return y
    partial = torch.empty((splits, *shape), dtype=torch.float32, device=device)
    launch_splits(partial, None)
    sum_splits(partial, bias, y)
    return y


def launch_product(
    kernel: Any, out: Tensor, x: Tensor, bias: Tensor | None, exponent: Tensor | None, launch: Launch, **weight: Any
) -> None:
    """Launches one of the kernels that have the arguments of ``weight_only_kernel``.

    Args:
        kernel: The kernel.
        out: [splits, M, N].
        x: [M, in_features padded to a multiple of 64].
        bias: [N], or None; only where there is one split.
        exponent: [M] int32, or None.
        launch: How it is launched, but for the splits.
        weight: The kernel's other arguments, by name.
    """
    splits, M, N = out.shape
    steps = x.shape[1] // (TILE_CODES * launch.tiles)
    grid = (triton.cdiv(N, 64 * launch.warps), triton.cdiv(M, launch.block_m), splits)
    kernel[grid](
        x_ptr=x,
        exponent_ptr=x if exponent is None else exponent,
        bias_ptr=x if bias is None else bias,
        out_ptr=out,
        M=M,
        N=N,
        steps=steps,
        steps_per_split=triton.cdiv(steps, splits),
        x_stride=x.stride(0),
        HAS_EXPONENT=exponent is not None,
        HAS_BIAS=bias is not None,
        TILES=launch.tiles,
        BLOCK_M=launch.block_m,
        WARPS=launch.warps,
        STAGES=launch.stages,
        UPCAST=INTERPRETED,
        num_warps=launch.warps,
        maxnreg=launch.max_registers,
        **weight,
    )


def sum_splits(partial: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Writes the sum of the splits [splits, M, N] float32 of a product, and its bias, to y [M, N]."""
    splits, M, N = partial.shape
    sum_splits_kernel[(triton.cdiv(M * N, _SUM_BLOCK),)](
        partial,
        partial if bias is None else bias,
        y,
        M * N,
        N,
        SPLITS=splits,
        HAS_BIAS=bias is not None,
        BLOCK=_SUM_BLOCK,
    )


def find_device(device: torch.device) -> Device:
    """Returns the device at hand, as the launch prior sees it; an A100 stands for the interpreter."""
    if device.type != "cuda":
        return DEVICES["a100"]
    return _describe_cuda_device(device.index or 0)


@functools.cache
def _describe_cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    architecture = 10 * properties.major + properties.minor
    published = [device for device in DEVICES.values() if device.architecture == architecture]
    nearest = published[0] if published else DEVICES["h100"]
    return Device(
        name=properties.name,
        architecture=architecture,
        processors=properties.multi_processor_count,
        clock_hz=nearest.clock_hz,
        read_bytes_per_s=nearest.read_bytes_per_s,
        source=nearest.source,
    )
