"""Device code: activations times a weight that is a sum of parts (``parted_layout``), and such a weight as floats.

A program walks along k once. The activations of a step and their sum are read and made once for all parts; the sums
over one group of a part are scaled and added to one accumulator, which is that of all parts:

    y += scale factor / STEP * (sum_k x_k c_k - (BASE + STEP zero) sum_k x_k),     c = BASE + STEP q (``group_product``)
"""

import triton
import triton.language as tl

from runtime.kernels.triton.fragment_unpacking import operand
from runtime.kernels.triton.group_product import (
    count_mantissa_bits,
    find_position,
    load_scale,
    load_scale_rows,
    load_words,
    multiply_add,
)
from runtime.kernels.triton.weight_only_kernel import store_product


@triton.constexpr_function
def count_words_before(parts, part):
    """Returns the words of a tile and row block that the parts before ``part`` have."""
    return sum(bits for bits, _, _ in parts[:part])


@triton.constexpr_function
def find_unit(parts, part, mantissa_bits):
    """Returns what a step of a part's code floats is worth in its scales."""
    bits, _, factor = parts[part]
    return factor / (1 << find_position(bits, mantissa_bits))


@triton.jit
def load_step_words(
    words_ptr, first_tile, tiles, row_block, row_block_mask, row_blocks, PARTS: tl.constexpr, TILES: tl.constexpr
):
    """Returns the words of a step as a tuple: of each part, each tile, those that ``load_words`` returns."""
    words = ()
    for part in tl.static_range(len(PARTS)):
        before = tl.cast(tiles * count_words_before(PARTS, part), tl.int64)
        part_ptr = words_ptr + before * (row_blocks * 16)
        for tile in tl.static_range(TILES):
            words = words + (
                load_words(part_ptr, first_tile + tile, row_block, row_block_mask, row_blocks, PARTS[part][0]),
            )
    return words


@triton.jit
def multiply_codes(
    words,
    x,
    sums,
    base_bits,
    PART: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    BITS: tl.constexpr,
    ZERO: tl.constexpr,
    WARPS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Returns STEP (q - zero) x' of one part and group, [64 * WARPS, BLOCK_M] float32 in tile order.

    Args:
        words: Those of all parts (``load_step_words``).
        x: The activations of the group, a tuple of [64 // PIECES, BLOCK_M] of each tile.
        sums: Their sums, [64 * WARPS, BLOCK_M].
        base_bits: The exponent of BASE.
        PART: Which part.
        PIECE, PIECES: Which piece of the tile of how many.
        BITS, ZERO: Width and zero point of the codes.
        WARPS, UPCAST: As in ``multiply_weight``.
    """
    DTYPE: tl.constexpr = x[0].dtype
    MANTISSA: tl.constexpr = count_mantissa_bits(DTYPE)
    POSITION: tl.constexpr = find_position(BITS, MANTISSA)
    products = tl.zeros(sums.shape, tl.float32)
    for tile in tl.static_range(len(x)):
        codes = operand(words[PART * len(x) + tile], base_bits, (), PIECE, PIECES, BITS, POSITION, -1, DTYPE, WARPS)
        products = multiply_add(codes, x[tile], products, UPCAST)
    return products - ((1 << MANTISSA) + (1 << POSITION) * ZERO) * sums


@triton.jit
def multiply_parts(
    x_rows,
    x_mask,
    words_ptr,
    scale_ptr,
    first_row_block,
    row_blocks,
    first_step,
    last_step,
    tiles,
    PARTS: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Returns W x' for 64 * WARPS rows of W and the steps of k given: [64 * WARPS, BLOCK_M] float32 in tile order.

    Args:
        x_rows, x_mask, first_row_block, row_blocks, first_step, last_step: As in ``multiply_weight``.
        words_ptr: The words of one part after the other, each [tiles, bits, row_blocks, 4, 4] int32.
        scale_ptr: [groups, SCALES, row_blocks, 4] int32, two float16 scales a word, or [groups, SCALES, row_blocks, 2],
            four bytes; not read where SCALES is 0.
        tiles: Tiles of a row.
        PARTS: (bits, zero point, factor) of each part.
        SCALES: Scales of a group: 1, as many as parts, or 0 for none at all.
        GROUP_SIZE, SCALE, TILES, BLOCK_M, WARPS, STAGES, UPCAST: As in ``multiply_weight``.
    """
    DTYPE: tl.constexpr = x_rows.dtype.element_ty
    MANTISSA: tl.constexpr = count_mantissa_bits(DTYPE)
    BASE_BITS: tl.constexpr = 0x43004300 if MANTISSA == 7 else 0x64006400
    PIECES: tl.constexpr = 64 // GROUP_SIZE if GROUP_SIZE == 16 or GROUP_SIZE == 32 else 1
    CODES: tl.constexpr = 64 // PIECES
    row_block = first_row_block + tl.arange(0, 8 * WARPS)
    row_block_mask = row_block < row_blocks
    # Kept in a register of each thread, as in ``multiply_weight``.
    base_bits = ((row_block >> 31) | BASE_BITS).to(tl.uint32, bitcast=True)[:, None, None]
    ones = tl.full((16 * WARPS, CODES), 1.0, tl.float32 if UPCAST else DTYPE)
    total = tl.zeros((64 * WARPS, BLOCK_M), tl.float32)
    for step in tl.range(first_step, last_step, num_stages=STAGES):
        words = load_step_words(
            words_ptr, step * TILES, tiles, row_block, row_block_mask, row_blocks, PARTS, TILES
        )  # fmt: skip
        for piece in tl.static_range(PIECES):
            group = step * PIECES + piece if PIECES > 1 else (step * 64 * TILES // GROUP_SIZE if GROUP_SIZE else 0)
            x = ()
            sums = tl.zeros((16 * WARPS, BLOCK_M), tl.float32)
            for tile in tl.static_range(TILES):
                k = (step * TILES + tile) * 64 + piece * CODES + tl.arange(0, CODES)
                x = x + (tl.trans(tl.load(x_rows[:, None] + k[None, :], mask=x_mask[:, None], other=0.0)),)
                sums = multiply_add(ones, x[tile], sums, UPCAST)
            # Tile order counts v slowest, so four copies of the sums lie one below the other.
            sums = tl.reshape(tl.broadcast_to(sums[None, :, :], (4, 16 * WARPS, BLOCK_M)), (64 * WARPS, BLOCK_M))
            for part in tl.static_range(len(PARTS)):
                codes = multiply_codes(
                    words, x, sums, base_bits, part, piece, PIECES, PARTS[part][0], PARTS[part][1], WARPS, UPCAST
                )
                if SCALES == 0:
                    total += find_unit(PARTS, part, MANTISSA) * codes
                else:
                    if SCALES > 1 or part == 0:
                        scale = load_scale(
                            scale_ptr, group * SCALES + part, row_block, row_block_mask, row_blocks, WARPS, SCALE
                        ).to(tl.float32)  # fmt: skip
                    total += (find_unit(PARTS, part, MANTISSA) * scale)[:, None] * codes
    return total


@triton.jit
def parted_kernel(
    x_ptr,
    words_ptr,
    scale_ptr,
    exponent_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    row_blocks,
    tiles,
    steps,
    steps_per_split,
    x_stride,
    PARTS: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE: tl.constexpr,
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
        x_ptr, exponent_ptr, bias_ptr, out_ptr, M, N, row_blocks: As in ``weight_only_kernel``.
        steps, steps_per_split, x_stride: As in ``weight_only_kernel``.
        words_ptr, scale_ptr, tiles, PARTS, SCALES, SCALE: As in ``multiply_parts``.
        GROUP_SIZE, HAS_EXPONENT, HAS_BIAS, TILES, BLOCK_M, WARPS, STAGES, UPCAST: As in ``weight_only_kernel``.
    """
    # One program: a block of y, over one range of k.
    split = tl.program_id(2)
    first_column = tl.program_id(0) * (64 * WARPS)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = multiply_parts(
        x_ptr + row.to(tl.int64) * x_stride,
        row < M,
        words_ptr,
        scale_ptr,
        first_column // 8,
        row_blocks,
        split * steps_per_split,
        tl.minimum(steps, (split + 1) * steps_per_split),
        tiles,
        PARTS,
        SCALES,
        SCALE,
        GROUP_SIZE,
        TILES,
        BLOCK_M,
        WARPS,
        STAGES,
        UPCAST,
    )
    store_product(
        total, exponent_ptr, bias_ptr, out_ptr, split, row, first_column, M, N, HAS_EXPONENT, HAS_BIAS, BLOCK_M, WARPS,
    )  # fmt: skip


@triton.jit
def load_part_affine(
    scale_ptr,
    group,
    row_block,
    row_block_mask,
    row_blocks,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    ZERO: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Returns scales, zero points and type of a part as ``pair_floats`` takes them; codes are at bit 1."""
    even, odd = load_scale_rows(scale_ptr, group, row_block, row_block_mask, row_blocks, SCALE, WARPS)
    first, second = even.to(tl.float32)[:, None, :] * UNIT, odd.to(tl.float32)[:, None, :] * UNIT
    zero = tl.full((8 * WARPS, 1, 4), ZERO, tl.float16)
    return first, second, zero, zero, tl.zeros((1, 1, 1), tl.float32)


@triton.jit
def dequantize_parts_kernel(
    words_ptr,
    scale_ptr,
    out_ptr,
    first_block,
    N,
    row_blocks,
    tiles,
    out_stride,
    PARTS: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Writes 64 * WARPS rows and 64 columns of the weight, its parts added in float32; grid (rows, tiles).

    Args:
        words_ptr, scale_ptr, tiles, PARTS, SCALES, SCALE, GROUP_SIZE: As in ``multiply_parts``.
        out_ptr, first_block, N, row_blocks, out_stride, WARPS: As in ``dequantize_kernel``.
    """
    first_row = tl.program_id(0) * (64 * WARPS)
    tile = tl.program_id(1)
    row_block = first_block + first_row // 8 + tl.arange(0, 8 * WARPS)
    mask = row_block < row_blocks
    base_bits = tl.full((8 * WARPS, 1, 1), 0x64006400, tl.uint32)
    words = load_step_words(words_ptr, tile, tiles, row_block, mask, row_blocks, PARTS, 1)
    PIECES: tl.constexpr = 4 if GROUP_SIZE == 16 else 2
    CODES: tl.constexpr = 64 // PIECES
    # Tile order (v, warp, j, g): each row is put where it belongs.
    place = tl.arange(0, 64 * WARPS)
    row = first_row + (place // 16 % WARPS * 8 + place % 8) * 8 + place // (16 * WARPS) * 2 + place // 8 % 2
    for piece in tl.static_range(PIECES):
        group = (tile * 64 + piece * CODES) // GROUP_SIZE if GROUP_SIZE else 0
        weight = tl.zeros((64 * WARPS, CODES), tl.float32)
        for part in tl.static_range(len(PARTS)):
            affine = load_part_affine(
                scale_ptr, group * SCALES + (part if SCALES > 1 else 0), row_block, mask, row_blocks,
                SCALE, PARTS[part][2] / 2, 1024 + 2 * PARTS[part][1], WARPS,
            )  # fmt: skip
            weight += operand(words[part], base_bits, affine, piece, PIECES, PARTS[part][0], 1, -1, tl.float16, WARPS)
        column = tile * 64 + piece * CODES + tl.arange(0, CODES)
        offset = row.to(tl.int64)[:, None] * out_stride + column[None, :]
        tl.store(out_ptr + offset, weight.to(out_ptr.dtype.element_ty), mask=row[:, None] < N)
