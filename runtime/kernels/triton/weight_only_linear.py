"""Products with a packed weight by the Triton kernels: launches them, and is what the rest of the project calls.

Which rows of x are multiplied by the codes and which by a dequantized weight is in ``product_launch``. Codes of 8 bits
and floats of few bits are no bfloat16 numbers as they are, so they are multiplied by bfloat16 activations as float16
numbers times a power of two for each row; float32 activations become two such rows, which costs nothing while both fit
the tensor core's eight (``row_scaling_kernel``).

Runs on a CUDA device, or on the CPU if Triton was imported with TRITON_INTERPRET=1.
"""

from functools import partial

import torch
import triton
from torch import Tensor

from runtime.kernels.triton.dequantize_kernel import dequantize_kernel
from runtime.kernels.triton.fragment_layout import TILE_CODES, TILE_ROWS, FragmentWeight
from runtime.kernels.triton.launch_table import Launch, LaunchKey, find_bucket, find_launch
from runtime.kernels.triton.product_launch import (
    INTERPRETED,
    find_device,
    launch_product,
    multiply_rows,
    multiply_split,
)
from runtime.kernels.triton.row_scaling import needs_scaled_rows
from runtime.kernels.triton.weight_only_kernel import weight_only_kernel

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
    y = multiply_rows(
        x.reshape(-1, x.shape[-1]),
        bias,
        out_features=out_features,
        scaled=needs_scaled_rows(x.dtype, bits, element),
        few=partial(_multiply_few, weight),
        dequantize=partial(dequantize_fragments, weight),
    )
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
        weight.kernel_factor,
        BITS=weight.bits,
        GROUP_SIZE=weight.group_size or 0,
        SYMMETRIC=weight.zero_point is None,
        SCALE=weight.scale_name,
        EXACT=dtype == weight.scale.dtype == torch.float16 and weight.element < 0 and weight.factor == 1,
        ELEMENT=weight.element,
        WARPS=_DEQUANTIZE_WARPS,
        # Twice as many as the rows are divided among: half a tile in float32 would not fit the registers of one.
        num_warps=2 * _DEQUANTIZE_WARPS,
    )
    return out[:, : weight.shape[1]].to(dtype)


def _multiply_few(
    weight: FragmentWeight,
    x: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    exponent: Tensor | None = None,
) -> Tensor:
    """Returns 2**exponent x W' + bias for up to 64 rows of x [M, in_features padded to a multiple of 64]."""
    launch = plan_product(weight, x)

    def launch_splits(out: Tensor, added: Tensor | None) -> None:
        launch_weight_only(weight, launch, out, x, added, exponent)

    return multiply_split(
        launch_splits,
        bias,
        splits=launch.splits,
        shape=(x.shape[0], weight.shape[0]),
        dtype=out_dtype,
        device=x.device,
    )


def plan_product(weight: FragmentWeight, x: Tensor) -> Launch:
    """Returns how the product of up to 64 rows x is launched."""
    device = find_device(x.device)
    key = LaunchKey(
        architecture=device.architecture,
        bits=weight.bits,
        rows=find_bucket(x.shape[0]),
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        group_size=weight.group_size,
    )
    return find_launch(key, device)


def launch_weight_only(
    weight: FragmentWeight,
    launch: Launch,
    out: Tensor,
    x: Tensor,
    bias: Tensor | None,
    exponent: Tensor | None,
) -> None:
    """Writes 2**exponent x W' + bias to out [splits, M, N], as addends where there are several splits."""
    words, scale, zero = view_words(weight)
    launch_product(
        weight_only_kernel,
        out,
        x,
        bias,
        exponent,
        launch,
        words_ptr=words,
        scale_ptr=scale,
        zero_ptr=zero,
        row_blocks=weight.words.shape[2],
        factor=weight.kernel_factor,
        BITS=weight.bits,
        GROUP_SIZE=weight.group_size or 0,
        SYMMETRIC=weight.zero_point is None,
        SCALE=weight.scale_name,
        ELEMENT=weight.element,
    )


def view_words(weight: FragmentWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Returns words, scales and zero points as 32-bit words; zero points that do not exist are not read."""
    scale = weight.scale.view(torch.int32)
    return weight.words, scale, scale if weight.zero_point is None else weight.zero_point.view(torch.int32)
