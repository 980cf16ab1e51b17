"""Device code: activations times a weight whose groups have 2 or 4 bits (``group_mixture_layout``), and its outliers.

Rows are wide in blocks of 16, and a program has 64 or 128 rows: it multiplies the codes of 2 bits of all of them, and
the low parts as if all were wide, but reads only those that there are; the others count for nothing,

    y += scale * (high - zero_high) x + (wide ? scale / 4 : 0) * (low - zero_low) x.
"""

import triton
import triton.language as tl

from runtime.kernels.triton.fragment_unpacking import operand, to_tile_order
from runtime.kernels.triton.group_product import (
    count_mantissa_bits,
    find_position,
    load_scale,
    load_words,
    load_zero,
    multiply_add,
)
from runtime.kernels.triton.weight_only_kernel import store_product


@triton.jit
def count_ones(bits):
    """Returns how many bits of uint32 words are one."""
    pairs = bits - ((bits >> 1) & 0x55555555)
    quads = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (quads + (quads >> 4)) & 0x0F0F0F0F
    return (octets * 0x01010101) >> 24


@triton.jit
def find_wide(flags_ptr, starts_ptr, group, row_block, row_block_mask, row_blocks):
    """Returns (wide, place) of a group and of the next one, the first being even.

    ``wide`` [8 * WARPS] says which blocks of 8 rows are wide in it, ``place`` where it is among their wide groups.
    """
    offset = group // 32 * tl.cdiv(row_blocks, 2) + row_block // 2
    flags = tl.load(flags_ptr + offset, mask=row_block_mask, other=0).to(tl.uint32, bitcast=True)
    start = tl.load(starts_ptr + offset, mask=row_block_mask, other=0)
    bit = tl.cast(group % 32, tl.uint32)
    before = flags & ((tl.full((), 1, tl.uint32) << bit) - 1)
    place = start + count_ones(before).to(tl.int32)
    wide = (flags >> bit) & 1
    return (wide != 0, place), ((flags >> (bit + 1)) & 1 != 0, place + wide.to(tl.int32))


@triton.jit
def load_low_word(low_ptr, place, wide, row_block, row_blocks):
    """Returns half a tile of low parts, uint32 [8 * WARPS, 4, 4]; zeros in rows that are not wide."""
    thread = tl.arange(0, 4)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    start = (place * row_blocks + row_block) * 16
    words = tl.load(low_ptr + (start[:, None, None] + thread), mask=wide[:, None, None], other=0)
    return words.to(tl.uint32, bitcast=True)


@triton.jit
def multiply_part(
    words,
    base_bits,
    x,
    sums,
    scale,
    zero,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    POSITION: tl.constexpr,
    WARPS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Returns scale * STEP (q - zero) x' of one group of codes of 2 bits, [64 * WARPS, BLOCK_M] in tile order.

    Args:
        words: The words of a tile, as ``load_words`` returns them.
        base_bits: The exponent of BASE.
        x: [64 // PIECES, BLOCK_M].
        sums: Sums of x, [64 * WARPS, BLOCK_M].
        scale, zero: [64 * WARPS] float32, the zero points as BASE + STEP zero.
        PIECE, PIECES: Which piece of the tile of how many.
        POSITION: Where the codes are put in their floats.
        WARPS, UPCAST: As in ``multiply_weight``.
    """
    codes = operand(words, base_bits, (), PIECE, PIECES, 2, POSITION, -1, x.dtype, WARPS)
    products = multiply_add(codes, x, tl.zeros(sums.shape, tl.float32), UPCAST)
    return scale[:, None] * (products - zero[:, None] * sums)


@triton.jit
def group_mixture_kernel(
    x_ptr,
    words_ptr,
    scale_ptr,
    zero_ptr,
    low_words_ptr,
    low_zero_ptr,
    flags_ptr,
    starts_ptr,
    exponent_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    row_blocks,
    steps,
    steps_per_split,
    x_stride,
    GROUP_SIZE: tl.constexpr,
    HAS_EXPONENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Computes BLOCK_M rows and 64 * WARPS columns of y, or one addend of them; grid (columns, rows, splits).

    Args:
        x_ptr, exponent_ptr, bias_ptr, out_ptr, M, N: As in ``weight_only_kernel``.
        words_ptr, scale_ptr, zero_ptr: Of the weight of 2 bits, as in ``multiply_weight``.
        low_words_ptr, low_zero_ptr, flags_ptr, starts_ptr: As in ``MixedGroups``.
        row_blocks, steps, steps_per_split, x_stride: As in ``weight_only_kernel``.
        GROUP_SIZE: 32 or 64.
        TILES: 1.
        HAS_EXPONENT, HAS_BIAS, BLOCK_M, WARPS, STAGES, UPCAST: As in ``weight_only_kernel``.
    """
    # One program: a block of y, over one range of k.
    split = tl.program_id(2)
    first_column = tl.program_id(0) * (64 * WARPS)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < M
    x_rows = x_ptr + row.to(tl.int64) * x_stride
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    MANTISSA: tl.constexpr = count_mantissa_bits(DTYPE)
    POSITION: tl.constexpr = find_position(2, MANTISSA)
    BASE_BITS: tl.constexpr = 0x43004300 if MANTISSA == 7 else 0x64006400
    PIECES: tl.constexpr = 64 // GROUP_SIZE
    row_block = first_column // 8 + tl.arange(0, 8 * WARPS)
    row_block_mask = row_block < row_blocks
    # Kept in a register of each thread, as in ``multiply_weight``.
    base_bits = ((row_block >> 31) | BASE_BITS).to(tl.uint32, bitcast=True)[:, None, None]
    ones = tl.full((16 * WARPS, GROUP_SIZE), 1.0, tl.float32 if UPCAST else DTYPE)
    total = tl.zeros((64 * WARPS, BLOCK_M), tl.float32)
    for step in tl.range(split * steps_per_split, tl.minimum(steps, (split + 1) * steps_per_split), num_stages=STAGES):
        words = load_words(words_ptr, step, row_block, row_block_mask, row_blocks, 2)
        found = find_wide(flags_ptr, starts_ptr, step * PIECES, row_block, row_block_mask, row_blocks)
        if PIECES == 2:
            first, second = found[0][1], found[1][1]
        else:
            first, second = 2 * found[0][1], 2 * found[0][1] + 1
        low_words = (
            load_low_word(low_words_ptr, first, found[0][0], row_block, row_blocks),
            load_low_word(low_words_ptr, second, found[PIECES - 1][0], row_block, row_blocks),
        )
        for piece in tl.static_range(PIECES):
            group = step * PIECES + piece
            k = step * 64 + piece * GROUP_SIZE + tl.arange(0, GROUP_SIZE)
            x = tl.trans(tl.load(x_rows[:, None] + k[None, :], mask=row_mask[:, None], other=0.0))
            sums = multiply_add(ones, x, tl.zeros((16 * WARPS, BLOCK_M), tl.float32), UPCAST)
            # Tile order counts v slowest, so four copies of the sums lie one below the other.
            sums = tl.reshape(tl.broadcast_to(sums[None, :, :], (4, 16 * WARPS, BLOCK_M)), (64 * WARPS, BLOCK_M))
            scale = load_scale(scale_ptr, group, row_block, row_block_mask, row_blocks, WARPS, "fp16").to(tl.float32)
            zero = load_zero(
                zero_ptr, group, row_block, row_block_mask, row_blocks, 2, MANTISSA, POSITION, False, WARPS
            )
            total += multiply_part(words, base_bits, x, sums, scale, zero, piece, PIECES, POSITION, WARPS, UPCAST)
            wide, place = found[piece]
            zero = load_zero(low_zero_ptr, place, row_block, wide, row_blocks, 2, MANTISSA, POSITION, False, WARPS)
            of_rows = to_tile_order(tl.broadcast_to(wide[:, None], (8 * WARPS, 8)), WARPS)
            scale = tl.where(of_rows, scale * 0.25, 0.0)
            total += multiply_part(low_words, base_bits, x, sums, scale, zero, piece, PIECES, POSITION, WARPS, UPCAST)
    store_product(
        total * (1.0 / (1 << POSITION)),
        exponent_ptr,
        bias_ptr,
        out_ptr,
        split,
        row,
        first_column,
        M,
        N,
        HAS_EXPONENT,
        HAS_BIAS,
        BLOCK_M,
        WARPS,
    )


@triton.jit
def outlier_kernel(x_ptr, outlier_ptr, outlier_column_ptr, out_ptr, N, count, x_stride, BLOCK: tl.constexpr):
    """Computes BLOCK columns of one row of x times the outliers; grid (columns, rows).

    Args:
        x_ptr: [M, K].
        outlier_ptr: [count, N] float16.
        outlier_column_ptr: [count, N] int16, of which 16 bits are the column of x.
        out_ptr: [M, N] float32.
        N, count: Columns of y, outliers of each.
        x_stride: Elements from one row of x to the next.
        BLOCK: Columns of one program.
    """
    row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < N
    x_row = x_ptr + row.to(tl.int64) * x_stride
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.range(0, count):
        k = tl.load(outlier_column_ptr + i * N + column, mask=mask, other=0).to(tl.int32) & 0xFFFF
        outlier = tl.load(outlier_ptr + i * N + column, mask=mask, other=0.0).to(tl.float32)
        total += outlier * tl.load(x_row + k, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * N + column, total, mask=mask)
