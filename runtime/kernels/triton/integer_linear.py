"""Products of integer activations with a packed weight by the Triton kernels: rounds the rows, launches the product.

Two launches: one rounds every row of x to integers (``activation_rounding_kernel``), one multiplies these with the
codes as they are (``integer_product_kernel``), any number of rows alike; a third adds the splits of k if there are any.

Runs on a CUDA device, or on the CPU if Triton was imported with TRITON_INTERPRET=1.
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from runtime.kernels.triton.activation_rounding_kernel import round_rows_kernel
from runtime.kernels.triton.fragment_layout import TILE_CODES, TWO_VALUES, FragmentWeight
from runtime.kernels.triton.integer_product_kernel import integer_product_kernel
from runtime.kernels.triton.integer_unpacking import find_quad_step
from runtime.kernels.triton.launch_table import MOST_ROWS, Launch, LaunchKey, find_bucket, find_launch
from runtime.kernels.triton.product_launch import find_device, sum_splits
from runtime.kernels.triton.weight_only_linear import view_words

_BLOCK = 1024
# Sums of up to 128 * 255 in 32 bits.
_MOST_SUMMED = 2**31 // (128 * 255) - 1


@dataclass(frozen=True, kw_only=True)
class IntegerRows:
    """Rows of activations as integers, x = scale * values, in the order in which a weight's codes are unpacked.

    Args:
        values: [rows, in_features padded to a multiple of 64] int8.
        scale: [rows] float32.
    """

    values: Tensor
    scale: Tensor


def fits_integers(weight: FragmentWeight) -> bool:
    """Returns True for weights of integers whose groups an integer product takes, and whose sums fit 32 bits."""
    summed = weight.shape[1] if weight.group_size is None else weight.group_size
    integers = weight.element < 0 and weight.scale_name != TWO_VALUES
    return integers and weight.group_size != 16 and summed <= _MOST_SUMMED


def round_rows(x: Tensor, scale: Tensor | None, *, reach: float, limit: int, quad_step: int) -> IntegerRows:
    """Returns activations rounded to integers from -limit to limit - 1.

    Args:
        x: [rows, in_features] float16, bfloat16 or float32.
        scale: [rows] float32, or None for that which maps the greatest magnitude of a row to ``reach``.
        reach: The magnitude in scales that a scale is set by.
        limit: Up to 128.
        quad_step: The order of the integers (``find_quad_step``).
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, count = x.shape
    values = torch.empty((rows, count + -count % TILE_CODES), dtype=torch.int8, device=x.device)
    found = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        round_rows_kernel[(rows,)](
            x,
            found if scale is None else scale,
            values,
            found,
            count,
            values.shape[1],
            x.stride(0),
            REACH=reach,
            LIMIT=limit,
            HAS_SCALE=scale is not None,
            QUAD_STEP=quad_step,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return IntegerRows(values=values, scale=found)


def triton_integer_linear(
    x: Tensor, weight: FragmentWeight, bias: Tensor | None, x_scale: Tensor | None, *, reach: float, limit: int
) -> Tensor:
    """Returns y = x^ W' + bias in the type of x, x^ being x rounded to integers times a scale.

    Args:
        x: [..., in_features] float16, bfloat16 or float32, on the device of the weight.
        weight: The weight [out_features, in_features], one of ``fits_integers``.
        bias: [out_features], or None.
        x_scale: [rows] float32, the scale of each row of x, or None for that of its greatest magnitude.
        reach, limit: As of ``round_rows``.

    Returns:
        [..., out_features].
    """
    y: Tensor = torch.ops.bitplan.integer_linear(
        x,
        weight.words,
        weight.scale,
        weight.zero_point,
        bias,
        x_scale,
        weight.bits,
        weight.group_size or 0,
        weight.shape[0],
        weight.factor,
        reach,
        limit,
    )
    return y


@torch.library.custom_op("bitplan::integer_linear", mutates_args=())
def integer_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    x_scale: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    factor: float,
    reach: float,
    limit: int,
) -> Tensor:
    """Returns x^ W' + bias; the arguments are fields of a ``FragmentWeight``, group_size 0 for the whole row."""
    weight = FragmentWeight(
        shape=(out_features, x.shape[-1]),
        bits=bits,
        group_size=group_size or None,
        words=words,
        scale=scale,
        zero_point=zero_point,
        factor=factor,
    )
    quad_step = find_quad_step(bits, group_size)
    rows = round_rows(x.reshape(-1, x.shape[-1]), x_scale, reach=reach, limit=limit, quad_step=quad_step)
    return _multiply(rows, weight, bias, x.dtype).view(*x.shape[:-1], out_features)


@integer_linear.register_fake
def _(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    x_scale: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    factor: float,
    reach: float,
    limit: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def find_integer_launch(weight: FragmentWeight, rows: int) -> Launch:
    """Returns the launch of a product: that of 64 rows, without splits, for more of them."""
    device = find_device(weight.words.device)
    key = LaunchKey(
        architecture=device.architecture,
        bits=weight.bits,
        rows=find_bucket(min(rows, MOST_ROWS)),
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        group_size=weight.group_size,
        activation_bits=8,
    )
    launch = find_launch(key, device)
    return launch if rows <= MOST_ROWS else replace(launch, splits=1)


def _multiply(x: IntegerRows, weight: FragmentWeight, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    M, N = x.values.shape[0], weight.shape[0]
    y = torch.empty((M, N), dtype=out_dtype, device=x.values.device)
    if M == 0:
        return y
    launch = find_integer_launch(weight, M)
    partial = y if launch.splits == 1 else torch.empty((launch.splits, M, N), dtype=torch.float32, device=y.device)
    words, scale, zero = view_words(weight)
    steps = weight.words.shape[0] // launch.tiles
    has_bias = bias is not None and launch.splits == 1
    grid = (triton.cdiv(N, 64 * launch.warps), triton.cdiv(M, launch.block_m), launch.splits)
    integer_product_kernel[grid](
        x.values,
        words,
        scale,
        zero,
        x.scale,
        bias if has_bias else x.scale,
        partial,
        M,
        N,
        weight.words.shape[2],
        steps,
        triton.cdiv(steps, launch.splits),
        x.values.stride(0),
        weight.kernel_factor,
        BITS=weight.bits,
        GROUP_SIZE=weight.group_size or 0,
        SYMMETRIC=weight.zero_point is None,
        SCALE=weight.scale_name,
        HAS_BIAS=has_bias,
        TILES=launch.tiles,
        BLOCK_M=launch.block_m,
        WARPS=launch.warps,
        STAGES=launch.stages,
        num_warps=launch.warps,
        maxnreg=launch.max_registers,
    )
    if launch.splits > 1:
        sum_splits(partial, bias, y)
    return y
