"""Device code: activations times a weight of integer codes, y = x W' + bias, and the sum of a split product.

A program walks along k, a step of 64 or 128 codes at a time; scale and zero point are applied to the accumulator, once
a group (``group_product``). Meant for up to some 64 rows of x, where the time is that of reading the weight.
"""

import triton
import triton.language as tl

from runtime.kernels.triton.fragment_unpacking import from_tile_order
from runtime.kernels.triton.group_product import (
    add_products,
    count_mantissa_bits,
    find_position,
    load_words,
    scale_products,
)
from runtime.kernels.triton.row_scaling_kernel import power_of_two


@triton.jit
def multiply_weight(
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
    UPCAST: tl.constexpr,
    ELEMENT: tl.constexpr = -1,
):
    """Returns W x' for 64 * WARPS rows of W and the steps of k given: [64 * WARPS, BLOCK_M] float32 in tile order.

    Args:
        x_rows: [BLOCK_M] pointers to rows of x, each as long as the padded rows of W.
        x_mask: [BLOCK_M], the rows that exist.
        words_ptr: [tiles, BITS, row_blocks, 4, 4] int32 (``fragment_layout``).
        scale_ptr: [groups, row_blocks, 4] int32, two float16 scales a word, or [groups, row_blocks, 2], four bytes.
        zero_ptr: [groups, words] int32, 4, 8, 16 or 32 zero points a word, or two float16 values of the code 0; not
            read when SYMMETRIC.
        first_row_block: The program's first block of 8 rows of W.
        last_row_block: Where the rows end that may be read.
        row_blocks: Blocks of 8 rows of W.
        first_step, last_step: Range of steps, each of 64 * TILES codes.
        BITS: Code width.
        GROUP_SIZE: Codes that share a scale; 0 for the whole row.
        SYMMETRIC: Zero is at the code 2**(BITS - 1), or at 1/2 for one bit.
        SCALE: The type of the scales (``FragmentWeight.scale_name``). In the result is the power of two that E4M3
            leaves (``group_product.load_scale_rows``).
        TILES: Tiles a step; the group size is a multiple of the step, or 16 or 32 with one tile.
        BLOCK_M: Rows of x.
        WARPS: Warps of the program.
        STAGES: Steps that are loaded ahead.
        UPCAST: Multiply in float32 (interpreter).
        ELEMENT: Mantissa bits of codes that are floats, -1 for integers. In the result of floats is the power of two
            that ``fragment_unpacking`` leaves.
    """
    DTYPE: tl.constexpr = x_rows.dtype.element_ty
    MANTISSA: tl.constexpr = count_mantissa_bits(DTYPE)
    POSITION: tl.constexpr = find_position(BITS, MANTISSA) if ELEMENT < 0 else 0
    BASE_BITS: tl.constexpr = 0x43004300 if MANTISSA == 7 else 0x64006400
    PARTS: tl.constexpr = 64 // GROUP_SIZE if GROUP_SIZE == 16 or GROUP_SIZE == 32 else 1
    CODES: tl.constexpr = 64 // PARTS
    row_block = first_row_block + tl.arange(0, 8 * WARPS)
    row_block_mask = row_block < last_row_block
    # row_block >> 31 is zero, which the compiler cannot know: it must keep BASE in a register of each thread, and the
    # mask of a code and its exponent become one instruction instead of two.
    base_bits = ((row_block >> 31) | BASE_BITS).to(tl.uint32, bitcast=True)[:, None, None]
    total = tl.zeros((64 * WARPS, BLOCK_M), tl.float32)
    for step in tl.range(first_step, last_step, num_stages=STAGES):
        for part in tl.static_range(PARTS):
            group = step * PARTS + part if PARTS > 1 else (step * 64 * TILES // GROUP_SIZE if GROUP_SIZE else 0)
            none = tl.zeros((64 * WARPS, BLOCK_M), tl.float32)
            products = (none, tl.zeros((16 * WARPS, BLOCK_M), tl.float32))
            for tile in tl.static_range(TILES):
                if part == 0:
                    words = load_words(words_ptr, step * TILES + tile, row_block, row_block_mask, row_blocks, BITS)
                k = (step * TILES + tile) * 64 + part * CODES + tl.arange(0, CODES)
                x = tl.trans(tl.load(x_rows[:, None] + k[None, :], mask=x_mask[:, None], other=0.0))
                products = add_products(
                    products, words, base_bits, x, part, PARTS, BITS, POSITION, ELEMENT, WARPS, UPCAST
                )
            total += scale_products(
                products, scale_ptr, zero_ptr, group, row_block, row_block_mask, row_blocks, BITS, MANTISSA, POSITION,
                SYMMETRIC, SCALE, ELEMENT, WARPS,
            )  # fmt: skip
    return total * (1.0 / (1 << POSITION))


@triton.jit
def store_product(
    total,
    exponent_ptr,
    bias_ptr,
    out_ptr,
    split,
    row,
    first_column,
    M,
    N,
    HAS_EXPONENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Writes W x' [64 * WARPS, BLOCK_M] in tile order as a block of y, or of one of its addends.

    Args:
        total: The product.
        exponent_ptr, bias_ptr, out_ptr, M, N, HAS_EXPONENT, HAS_BIAS: As in ``weight_only_kernel``.
        split: Which addend.
        row: [BLOCK_M], the rows of y.
        first_column: The first column of y.
        BLOCK_M, WARPS: As in ``multiply_weight``.
    """
    y = from_tile_order(total, WARPS, BLOCK_M)
    row_mask = row < M
    if HAS_EXPONENT:
        y *= power_of_two(tl.load(exponent_ptr + row, mask=row_mask, other=0))[None, :]
    column = first_column + tl.arange(0, 64 * WARPS)
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)[:, None]
    offset = (split * M + row).to(tl.int64)[None, :] * N + column[:, None]
    mask = row_mask[None, :] & (column[:, None] < N)
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weight_only_kernel(
    x_ptr,
    words_ptr,
    scale_ptr,
    zero_ptr,
    exponent_ptr,
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
    HAS_EXPONENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
    ELEMENT: tl.constexpr,
):
    """Computes BLOCK_M rows and 64 * WARPS columns of y, or one addend of them; grid (columns, rows, splits).

    Args:
        x_ptr: [M, K padded to a multiple of 64] float16, or bfloat16 for codes of up to 7 bits.
        words_ptr, scale_ptr, zero_ptr: As in ``multiply_weight``.
        exponent_ptr: [M] int32, of the power of two that a row of y is multiplied by; read when HAS_EXPONENT.
        bias_ptr: [N], read when HAS_BIAS.
        out_ptr: [splits, M, N]; float32 when there are several splits.
        M, N: Rows of x, rows of the weight.
        row_blocks: ceil(N / 8).
        steps: Steps of k in all.
        steps_per_split: Steps of one program.
        x_stride: Elements from one row of x to the next.
        factor: What W is multiplied by, float32.
        BITS, GROUP_SIZE, SYMMETRIC, SCALE, TILES, BLOCK_M, WARPS, STAGES, UPCAST, ELEMENT: As in ``multiply_weight``.
        HAS_EXPONENT: Rows of x are scaled.
        HAS_BIAS: Add the bias.
    """
    # One program: a block of y, over one range of k.
    split = tl.program_id(2)
    first_column = tl.program_id(0) * (64 * WARPS)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = multiply_weight(
        x_ptr + row.to(tl.int64) * x_stride,
        row < M,
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
        UPCAST,
        ELEMENT,
    )
    store_product(
        total * factor, exponent_ptr, bias_ptr, out_ptr, split, row, first_column, M, N, HAS_EXPONENT, HAS_BIAS,
        BLOCK_M, WARPS,
    )  # fmt: skip


@triton.jit
def sum_splits_kernel(
    partial_ptr, bias_ptr, out_ptr, count, N, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds the splits of BLOCK elements of y in their order, so that every run gives the same bits.

    Args:
        partial_ptr: [SPLITS, count] float32.
        bias_ptr: [N], read when HAS_BIAS.
        out_ptr: [count].
        count: Elements of y.
        N: Columns of y.
        SPLITS: How many addends.
        HAS_BIAS: Add the bias.
        BLOCK: Elements of one program.
    """
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = element < count
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + split * count + element, mask=mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + element % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + element, total.to(out_ptr.dtype.element_ty), mask=mask)
