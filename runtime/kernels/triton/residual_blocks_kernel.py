"""Device code: activations times residual blocks, W = sum_b S_b * (U_b V_b), the signs read as they are.

    y_n = sum_b sum_r U_b[n, r] (S_b (V_b[r] * x))_n

For each block a token becomes rank rows V_b[r] * x, which are multiplied by the signs as one bit of code; the rows of
the product are weighted by U and added. So every sign is read once, and nothing of the size of W is made.
"""

import triton
import triton.language as tl

from runtime.kernels.triton.fragment_unpacking import from_tile_order
from runtime.kernels.triton.parted_kernel import multiply_parts
from runtime.kernels.triton.row_scaling_kernel import SPLIT_SCALE, power_of_two


@triton.jit
def residual_blocks_kernel(
    x_ptr,
    exponent_ptr,
    words_ptr,
    left_ptr,
    out_ptr,
    tokens,
    N,
    row_blocks,
    tiles,
    steps,
    steps_per_split,
    splits,
    x_stride,
    RANK: tl.constexpr,
    X_PARTS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Computes an addend of 64 * WARPS columns of one token's y; grid (columns, tokens, blocks * splits).

    Args:
        x_ptr: [X_PARTS, tokens, blocks, RANK, K padded to a multiple of 64] float16, the scaled rows V * x.
        exponent_ptr: [X_PARTS, tokens, blocks, RANK] int32, of the powers of two that the rows are multiplied by.
        words_ptr: [blocks, tiles, row_blocks, 4, 4] int32, the signs as one bit of code.
        left_ptr: [blocks, N, RANK] float16.
        out_ptr: [blocks * splits, tokens, N] float32.
        tokens: Rows of y.
        N, row_blocks, tiles, steps, steps_per_split, x_stride: As in ``parted_kernel``.
        splits: Ranges of k of a block.
        RANK: Rows of a token and block.
        X_PARTS: 2 for rows in two parts (``row_scaling_kernel``), else 1.
        TILES, WARPS, STAGES, UPCAST: As in ``multiply_weight``.
        BLOCK_M: At least X_PARTS * RANK.
    """
    # One program: a block of columns of one token, by one residual block, over one range of k.
    token, addend = tl.program_id(1), tl.program_id(2)
    block, split = addend // splits, addend % splits
    blocks = tl.num_programs(2) // splits
    first_column = tl.program_id(0) * (64 * WARPS)
    factor = tl.arange(0, BLOCK_M)
    factor_mask = factor < X_PARTS * RANK
    part, rank = factor // RANK, factor % RANK
    row = ((part * tokens + token) * blocks + block) * RANK + rank
    products = multiply_parts(
        x_ptr + row.to(tl.int64) * x_stride,
        factor_mask,
        words_ptr + tl.cast(block * tiles, tl.int64) * (row_blocks * 16),
        words_ptr,
        first_column // 8,
        row_blocks,
        split * steps_per_split,
        tl.minimum(steps, (split + 1) * steps_per_split),
        tiles,
        ((1, 0.5, 2.0),),
        0,
        "fp16",
        0,
        TILES,
        BLOCK_M,
        WARPS,
        STAGES,
        UPCAST,
    )
    column = first_column + tl.arange(0, 64 * WARPS)
    left = tl.load(
        left_ptr + tl.cast(block * N + column, tl.int64)[:, None] * RANK + rank[None, :],
        mask=(column[:, None] < N) & factor_mask[None, :],
        other=0.0,
    )
    unit = power_of_two(tl.load(exponent_ptr + row, mask=factor_mask, other=0))
    if X_PARTS == 2:
        unit = tl.where(part == 0, unit, unit / SPLIT_SCALE)
    y = tl.sum(from_tile_order(products, WARPS, BLOCK_M) * left.to(tl.float32) * unit[None, :], axis=1)
    tl.store(out_ptr + tl.cast(addend * tokens + token, tl.int64) * N + column, y, mask=column < N)
