"""Products with a packed weight by the Triton kernels: launches them, and is what the rest of the project calls.

Up to 64 rows of x are multiplied by the codes as they are. For more rows the weight is dequantized first, a block of
its rows at a time, and multiplied by the library's GEMM: then the time is that of arithmetic, and the weight is the
very one that the reference multiplies by.

Codes of 8 bits and floats of few bits are no bfloat16 numbers as they are, so they are multiplied by bfloat16
activations as float16 numbers times a power of two for each row; float32 activations become two such rows, which costs
nothing while both fit the tensor core's eight (``row_scaling_kernel``).

Runs on a CUDA device, or on the CPU if Triton was imported with TRITON_INTERPRET=1.
"""

import functools

import torch
import triton
from torch import Tensor

from runtime.kernels.triton.dequantize_kernel import dequantize_kernel
from runtime.kernels.triton.devices import DEVICES, Device
from runtime.kernels.triton.fragment_layout import TILE_CODES, TILE_ROWS, FragmentWeight
from runtime.kernels.triton.launch_table import MOST_ROWS, LaunchKey, find_bucket, find_launch
from runtime.kernels.triton.row_scaling import needs_scaled_rows, scale_rows, sum_parts
from runtime.kernels.triton.weight_only_kernel import sum_splits_kernel, weight_only_kernel

# Whether kernels run in Triton's interpreter: fixed when they are defined, for the life of the process.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_SUM_BLOCK = 1024
# Rows of the weight that are dequantized at once: bounds the memory to 4096 x K floats.
_DEQUANTIZED_ROWS = 4096
_DEQUANTIZE_WARPS = 2


def triton_linear(x: Tensor, weight: FragmentWeight, bias: Tensor | None = None) -> Tensor:
    """Returns y = x W' + bias in the type of x.

    Args:
        x: [..., in_features] float16, bfloat16 or float32, on the device of the weight.
        weight: The weight [out_features, in_features] as ``pack_fragments`` made it.
        bias: [out_features], or None.

    Returns:
        [..., out_features].
    """
    y: Tensor = torch.ops.bitplan.weight_only_linear(
        x,
        weight.words,
        weight.scale,
        weight.zero_point,
        bias,
        weight.bits,
        weight.group_size or 0,
        weight.shape[0],
        weight.element,
        weight.factor,
    )
    return y


@torch.library.custom_op("bitplan::weight_only_linear", mutates_args=())
def weight_only_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    element: int = -1,
    factor: float = 1.0,
) -> Tensor:
    """Returns x W' + bias; the arguments are the fields of a ``FragmentWeight``, group_size 0 for the whole row."""
    weight = FragmentWeight(
        shape=(out_features, x.shape[-1]),
        bits=bits,
        group_size=group_size or None,
        words=words,
        scale=scale,
        zero_point=zero_point,
        element=element,
        factor=factor,
    )
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype == torch.float32:
        y = _multiply_float32(rows, weight)
        y = y if bias is None else y + bias
    elif rows.shape[0] > MOST_ROWS:
        y = _multiply_many(rows, weight, bias)
    elif needs_scaled_rows(x.dtype, bits, element):
        scaled = scale_rows(rows)
        y = _multiply_few(scaled.values[0], weight, bias, x.dtype, scaled.exponent[0])
    else:
        padded = torch.nn.functional.pad(rows, (0, -weight.shape[1] % TILE_CODES)).contiguous()
        y = _multiply_few(padded, weight, bias, x.dtype)
    return y.view(*x.shape[:-1], out_features)


@weight_only_linear.register_fake
def _(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    element: int = -1,
    factor: float = 1.0,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def dequantize_fragments(weight: FragmentWeight, dtype: torch.dtype, rows: tuple[int, int] | None = None) -> Tensor:
    """Returns the weight [out_features, in_features] rounded to float16 or bfloat16, or a range of its rows.

    Args:
        weight: The packed weight.
        dtype: torch.float16 or torch.bfloat16.
        rows: (first, last) rows, the first a multiple of 8.
    """
    first, last = rows or (0, weight.shape[0])
    tiles = weight.words.shape[0]
    # The interpreter truncates where it should round to bfloat16; there torch rounds.
    stored = torch.float32 if INTERPRETED else dtype
    out = torch.empty((last - first, tiles * TILE_CODES), dtype=stored, device=weight.words.device)
    words, scale, zero = view_words(weight)
    block = first // TILE_ROWS
    grid = (triton.cdiv(last - first, TILE_CODES * _DEQUANTIZE_WARPS), tiles)
    dequantize_kernel[grid](
        words,
        scale,
        zero,
        out,
        block,
        last - first,
        weight.words.shape[2],
        out.stride(0),
        weight.factor,
        BITS=weight.bits,
        GROUP_SIZE=weight.group_size or 0,
        SYMMETRIC=weight.zero_point is None,
        EXACT=dtype == torch.float16 and weight.element < 0 and weight.factor == 1,
        ELEMENT=weight.element,
        WARPS=_DEQUANTIZE_WARPS,
        # Twice as many as the rows are divided among: half a tile in float32 would not fit the registers of one.
        num_warps=2 * _DEQUANTIZE_WARPS,
    )
    return out[:, : weight.shape[1]].to(dtype)


def _multiply_few(
    x: Tensor,
    weight: FragmentWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    exponent: Tensor | None = None,
) -> Tensor:
    """Returns 2**exponent x W' + bias for up to 64 rows of x [M, in_features padded to a multiple of 64]."""
    M, (N, K) = x.shape[0], weight.shape
    y = torch.empty((M, N), dtype=out_dtype, device=x.device)
    if M == 0:
        return y
    device = find_device(x.device)
    key = LaunchKey(
        architecture=device.architecture,
        bits=weight.bits,
        rows=find_bucket(M),
        out_features=N,
        in_features=K,
        group_size=weight.group_size,
    )
    launch = find_launch(key, device)
    partial = y if launch.splits == 1 else torch.empty((launch.splits, M, N), dtype=torch.float32, device=x.device)
    words, scale, zero = view_words(weight)
    steps = weight.words.shape[0] // launch.tiles
    grid = (triton.cdiv(N, 64 * launch.warps), triton.cdiv(M, launch.block_m), launch.splits)
    has_bias = bias is not None
    weight_only_kernel[grid](
        x,
        words,
        scale,
        zero,
        x if exponent is None else exponent,
        bias if has_bias and launch.splits == 1 else x,
        partial,
        M,
        N,
        weight.words.shape[2],
        steps,
        triton.cdiv(steps, launch.splits),
        x.stride(0),
        weight.factor,
        BITS=weight.bits,
        GROUP_SIZE=weight.group_size or 0,
        SYMMETRIC=weight.zero_point is None,
        HAS_EXPONENT=exponent is not None,
        HAS_BIAS=has_bias and launch.splits == 1,
        TILES=launch.tiles,
        BLOCK_M=launch.block_m,
        WARPS=launch.warps,
        STAGES=launch.stages,
        UPCAST=INTERPRETED,
        ELEMENT=weight.element,
        num_warps=launch.warps,
        maxnreg=launch.max_registers,
    )
    if launch.splits > 1:
        sum_splits(partial, bias, y)
    return y


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


def _multiply_many(x: Tensor, weight: FragmentWeight, bias: Tensor | None) -> Tensor:
    N = weight.shape[0]
    y = torch.empty((x.shape[0], N), dtype=x.dtype, device=x.device)
    for first in range(0, N, _DEQUANTIZED_ROWS):
        last = min(N, first + _DEQUANTIZED_ROWS)
        part = None if bias is None else bias[first:last].to(x.dtype)
        dense = dequantize_fragments(weight, x.dtype, (first, last))
        y[:, first:last] = torch.nn.functional.linear(x, dense, part)
    return y


def _multiply_float32(x: Tensor, weight: FragmentWeight) -> Tensor:
    scaled = scale_rows(x)
    parts, exponents = scaled.values.flatten(0, 1), scaled.exponent.flatten()
    pieces = []
    for first in range(0, max(1, parts.shape[0]), MOST_ROWS):
        some = slice(first, first + MOST_ROWS)
        pieces.append(_multiply_few(parts[some], weight, None, torch.float32, exponents[some]))
    return sum_parts(torch.cat(pieces).view(2, x.shape[0], weight.shape[0]))


def view_words(weight: FragmentWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Returns words, scales and zero points as 32-bit words; zero points that do not exist are not read."""
    scale = weight.scale.view(torch.int32)
    return weight.words, scale, scale if weight.zero_point is None else weight.zero_point.view(torch.int32)


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
