"""Products with residual blocks by the Triton kernels: three launches, of which one reads the weight.

One makes rank rows of each token and block, the second multiplies them by the signs, the third adds the blocks.
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from runtime.kernels.triton.devices import Device
from runtime.kernels.triton.launch_table import MOST_ROWS, Launch, LaunchKey, find_bucket, find_launch
from runtime.kernels.triton.product_launch import INTERPRETED, find_device, sum_splits
from runtime.kernels.triton.residual_blocks_kernel import residual_blocks_kernel
from runtime.kernels.triton.row_scaling import ScaledRows, scale_rows

# Least columns of a tensor core's operand.
_LEAST_BLOCK_ROWS = 8
# What the registers of a program hold: rank 16 in two parts.
MOST_RANK_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class ResidualBlocks:
    """A weight [out_features, in_features] as residual blocks, the sum over b of S_b * (U_b V_b).

    Args:
        words: [blocks, tiles, ceil(out_features / 8), 4, 4] int32, the signs as codes of one bit.
        left: [blocks, out_features, rank] float16, the U_b.
        right: [blocks, rank, in_features] float16, the V_b.
    """

    words: Tensor
    left: Tensor
    right: Tensor


def residual_linear(x: Tensor, weight: ResidualBlocks, bias: Tensor | None = None) -> Tensor:
    """Returns y = x W' + bias in the type of x.

    Of activations of 16 bits the products with V are rounded to float16, each within 2**-11.

    Args:
        x: [..., in_features] float16, bfloat16 or float32, on the device of the weight. Of 64 rows at a time the
            products with all of V are held.
        weight: The weight [out_features, in_features].
        bias: [out_features], or None.

    Returns:
        [..., out_features].
    """
    y: Tensor = torch.ops.bitplan.residual_linear(x, weight.words, weight.left, weight.right, bias)
    return y


@torch.library.custom_op("bitplan::residual_linear", mutates_args=())
def residual_linear_op(x: Tensor, words: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Returns x W' + bias; the arguments are the fields of ``ResidualBlocks``."""
    rows = x.reshape(-1, x.shape[-1])
    y = torch.empty((len(rows), left.shape[1]), dtype=x.dtype, device=x.device)
    for first in range(0, len(rows), MOST_ROWS):
        some = slice(first, first + MOST_ROWS)
        _multiply_few(rows[some], words, left, right, bias, y[some])
    return y.view(*x.shape[:-1], y.shape[1])


@residual_linear_op.register_fake
def _(x: Tensor, words: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], left.shape[1]))


def find_residual_launch(device: Device, *, rows: int, out_features: int, in_features: int) -> Launch:
    """Returns how the product with residual blocks is launched.

    Args:
        device: What the prior reckons with.
        rows: Rows of a token and block, ``MOST_RANK_ROWS`` at most: they are one program's.
        out_features: Rows of all blocks.
        in_features: Length of a row.
    """
    key = LaunchKey(
        architecture=device.architecture,
        bits=1,
        rows=find_bucket(rows),
        out_features=out_features,
        in_features=in_features,
        group_size=None,
    )
    return replace(find_launch(key, device), block_m=max(_LEAST_BLOCK_ROWS, triton.next_power_of_2(rows)))


def _multiply_few(x: Tensor, words: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Writes x W' + bias to y [rows, out_features]."""
    blocks, N, rank = left.shape
    scaled = scale_rows(x, right.flatten(0, 1))
    launch = find_residual_launch(
        find_device(x.device), rows=len(scaled.values) * rank, out_features=blocks * N, in_features=x.shape[-1]
    )
    out = torch.empty((blocks * launch.splits, *y.shape), dtype=torch.float32, device=x.device)
    _launch_blocks(scaled, words, left, launch, out)
    sum_splits(out, bias, y)


def _launch_blocks(scaled: ScaledRows, words: Tensor, left: Tensor, launch: Launch, out: Tensor) -> None:
    """Writes the addends [blocks * splits, tokens, N] of a product."""
    blocks, N, rank = left.shape
    steps = words.shape[1] // launch.tiles
    grid = (triton.cdiv(N, 64 * launch.warps), out.shape[1], len(out))
    residual_blocks_kernel[grid](
        x_ptr=scaled.values,
        exponent_ptr=scaled.exponent,
        words_ptr=words,
        left_ptr=left,
        out_ptr=out,
        tokens=out.shape[1],
        N=N,
        row_blocks=words.shape[2],
        tiles=words.shape[1],
        steps=steps,
        steps_per_split=triton.cdiv(steps, launch.splits),
        splits=launch.splits,
        x_stride=scaled.values.stride(1),
        RANK=rank,
        X_PARTS=len(scaled.values),
        TILES=launch.tiles,
        BLOCK_M=launch.block_m,
        WARPS=launch.warps,
        STAGES=launch.stages,
        UPCAST=INTERPRETED,
        num_warps=launch.warps,
        maxnreg=launch.max_registers,
    )
