"""Device code: activations rounded to integers times a weight of integer codes, by integer tensor cores.

With x = s_x i (i integers of 8 bits or fewer, s_x a scale for each row) and W = s (q - z),

    y = s_x sum over groups of s (sum_k i_k q_k - z sum_k i_k),

where both sums of a group are integers of 32 bits, hence exact, and everything else is done once a group. The sum of i
is a product with ones, as in ``group_product``. Codes of 8 bits are taken less 128, and so are their zero points; when
these are 128 the second sum is not needed. One bit of two opposite values is s / 2 (2 q - 1).

A group of 32 codes is one instruction's; 16 would be half of one, and are left to the weight-only product.
"""

import triton
import triton.language as tl

from runtime.kernels.triton.fragment_unpacking import from_tile_order
from runtime.kernels.triton.group_product import load_scale, load_words, load_zero_codes
from runtime.kernels.triton.integer_unpacking import find_quad_step, integer_operand


@triton.jit
def add_integers(
    products,
    words,
    unknown_zero,
    x,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    POSITION: tl.constexpr,
    QUAD_STEP: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Returns the integer sums of a group after one more tile or part of a tile.

    ``products`` is (of i q, of i), int32: [64 * WARPS, BLOCK_M], and [16 * WARPS, BLOCK_M], the same in every row.
    """
    codes = integer_operand(words, unknown_zero, PART, PARTS, BITS, POSITION, QUAD_STEP, WARPS)
    sums = products[1]
    if HAS_SUMS:
        ones = tl.full((16 * WARPS, x.shape[0]), 1, tl.int8)
        sums = tl.dot(ones, x, sums, out_dtype=tl.int32)
    return tl.dot(codes, x, products[0], out_dtype=tl.int32), sums


@triton.jit
def scale_integers(
    products,
    scale_ptr,
    zero_ptr,
    group,
    row_block,
    row_block_mask,
    row_blocks,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Returns s (sum of i q - z sum of i) of a group in float32, [64 * WARPS, BLOCK_M], from its integer sums."""
    scale = load_scale(scale_ptr, group, row_block, row_block_mask, row_blocks, WARPS, SCALE)
    sums = tl.reshape(tl.broadcast_to(products[1][None, :, :], (4, 16 * WARPS, BLOCK_M)), (64 * WARPS, BLOCK_M))
    if SYMMETRIC and BITS == 8:
        whole = products[0]
    elif SYMMETRIC:
        # 2 q - 1 for one bit, whose code is at bit 1.
        ZERO: tl.constexpr = 1 if BITS == 1 else 1 << (BITS - 1)
        whole = products[0] - ZERO * sums
    else:
        zero = load_zero_codes(zero_ptr, group, row_block, row_block_mask, row_blocks, BITS, WARPS).to(tl.int32)
        if BITS == 8:
            zero -= 128
        whole = products[0] - zero[:, None] * sums
    return scale.to(tl.float32)[:, None] * whole.to(tl.float32)


@triton.jit
def multiply_integers(
    x_rows,
    x_mask,
    words_ptr,
    scale_ptr,
    zero_ptr,
    first_row_block,
    last_row_block,
    row_blocks,
    first_step,
    last_step,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SCALE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Returns W i' for 64 * WARPS rows of W and the steps of k given: [64 * WARPS, BLOCK_M] float32 in tile order.

    Args:
        x_rows: [BLOCK_M] pointers to rows of int8 activations in the order of ``integer_unpacking``.
        x_mask: [BLOCK_M], the rows that exist.
        words_ptr, scale_ptr, zero_ptr, first_row_block, last_row_block, row_blocks, first_step, last_step: As in
            ``weight_only_kernel.multiply_weight``.
        BITS, SYMMETRIC, SCALE, TILES, BLOCK_M, WARPS, STAGES: Likewise.
        GROUP_SIZE: Codes that share a scale, 32 or a multiple of 64; 0 for the whole row.
    """
    POSITION: tl.constexpr = 1 if SYMMETRIC and BITS == 1 else 0
    QUAD_STEP: tl.constexpr = find_quad_step(BITS, GROUP_SIZE)
    HAS_SUMS: tl.constexpr = not (SYMMETRIC and BITS == 8)
    PARTS: tl.constexpr = 2 if GROUP_SIZE == 32 else 1
    CODES: tl.constexpr = 64 // PARTS
    row_block = first_row_block + tl.arange(0, 8 * WARPS)
    mask = row_block < last_row_block
    unknown_zero = (row_block >> 31).to(tl.uint32, bitcast=True)[:, None, None]
    total = tl.zeros((64 * WARPS, BLOCK_M), tl.float32)
    whole, sums = tl.zeros((64 * WARPS, BLOCK_M), tl.int32), tl.zeros((16 * WARPS, BLOCK_M), tl.int32)
    for step in tl.range(first_step, last_step, num_stages=STAGES):
        for part in tl.static_range(PARTS):
            if GROUP_SIZE == 0:
                products = (whole, sums)
            else:
                products = (tl.zeros((64 * WARPS, BLOCK_M), tl.int32), tl.zeros((16 * WARPS, BLOCK_M), tl.int32))
            for tile in tl.static_range(TILES):
                if part == 0:
                    words = load_words(words_ptr, step * TILES + tile, row_block, mask, row_blocks, BITS)
                k = (step * TILES + tile) * 64 + part * CODES + tl.arange(0, CODES)
                x = tl.trans(tl.load(x_rows[:, None] + k[None, :], mask=x_mask[:, None], other=0))
                products = add_integers(
                    products, words, unknown_zero, x, part, PARTS, BITS, POSITION, QUAD_STEP, HAS_SUMS, WARPS
                )
            if GROUP_SIZE == 0:
                whole, sums = products
            else:
                group = (step * 64 * TILES + part * CODES) // GROUP_SIZE
                total += scale_integers(
                    products,
                    scale_ptr,
                    zero_ptr,
                    group,
                    row_block,
                    mask,
                    row_blocks,
                    BITS,
                    SYMMETRIC,
                    SCALE,
                    BLOCK_M,
                    WARPS,
                )
    if GROUP_SIZE == 0:
        total = scale_integers(
            (whole, sums), scale_ptr, zero_ptr, 0, row_block, mask, row_blocks, BITS, SYMMETRIC, SCALE, BLOCK_M, WARPS
        )
    return total * 0.5 if POSITION == 1 else total


@triton.jit
def integer_product_kernel(
    x_ptr,
    words_ptr,
    scale_ptr,
    zero_ptr,
    x_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    row_blocks,
    steps,
    steps_per_split,
    x_stride,
    factor,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Computes BLOCK_M rows and 64 * WARPS columns of y, or one addend of them; grid (columns, rows, splits).

    Args:
        x_ptr: [M, K padded to a multiple of 64] int8 in the order of ``integer_unpacking``.
        words_ptr, scale_ptr, zero_ptr: As in ``weight_only_kernel.multiply_weight``.
        x_scale_ptr: [M] float32, the scale of each row of x.
        bias_ptr: [N], read when HAS_BIAS.
        out_ptr: [splits, M, N]; float32 when there are several splits.
        M, N: Rows of x, rows of the weight.
        row_blocks: ceil(N / 8).
        steps: Steps of k in all.
        steps_per_split: Steps of one program.
        x_stride: Elements from one row of x to the next.
        factor: What W is multiplied by, float32.
        BITS, GROUP_SIZE, SYMMETRIC, SCALE, TILES, BLOCK_M, WARPS, STAGES: As in ``multiply_integers``.
        HAS_BIAS: Add the bias.
    """
    # One program: a block of y, over one range of k.
    split = tl.program_id(2)
    first_column = tl.program_id(0) * (64 * WARPS)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < M
    total = multiply_integers(
        x_ptr + row.to(tl.int64) * x_stride,
        row_mask,
        words_ptr,
        scale_ptr,
        zero_ptr,
        first_column // 8,
        row_blocks,
        row_blocks,
        split * steps_per_split,
        tl.minimum(steps, (split + 1) * steps_per_split),
        BITS,
        GROUP_SIZE,
        SYMMETRIC,
        SCALE,
        TILES,
        BLOCK_M,
        WARPS,
        STAGES,
    )
    x_scale = tl.load(x_scale_ptr + row, mask=row_mask, other=0.0) * factor
    y = from_tile_order(total, WARPS, BLOCK_M) * x_scale[None, :]
    column = first_column + tl.arange(0, 64 * WARPS)
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[:, None]
    offset = (split * M + row).to(tl.int64)[None, :] * N + column[:, None]
    mask = row_mask[None, :] & (column[:, None] < N)
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=mask)
