"""Device code: a weight back to floats of 16 bits, s (q - z), for products with many rows of x."""

import triton
import triton.language as tl

from runtime.kernels.triton.fragment_unpacking import operand
from runtime.kernels.triton.group_product import TWO_VALUES, load_fields, load_scale_rows, load_words, zero_bits


@triton.jit
def load_affine(
    scale_ptr,
    zero_ptr,
    group,
    row_block,
    row_block_mask,
    row_blocks,
    like,
    factor,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SCALE: tl.constexpr,
    EXACT: tl.constexpr,
    ELEMENT: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Returns the scales and zero points of a group, and ``like``, as ``pair_floats`` takes them.

    EXACT says that s (q - z) is rounded once in float16: to that type, of integers with scales of that type and without
    a factor. Otherwise the scales times the factor are float32, and so is the product.
    """
    SCALE_DTYPE: tl.constexpr = tl.float16 if EXACT else tl.float32
    even, odd = load_scale_rows(scale_ptr, group, row_block, row_block_mask, row_blocks, SCALE, WARPS)
    scale0, scale1 = even.to(SCALE_DTYPE)[:, None, :], odd.to(SCALE_DTYPE)[:, None, :]
    if not EXACT:
        scale0, scale1 = scale0 * factor, scale1 * factor
    if SCALE == TWO_VALUES:
        even, odd = load_scale_rows(zero_ptr, group, row_block, row_block_mask, row_blocks, SCALE, WARPS)
        low0, low1 = even.to(SCALE_DTYPE)[:, None, :], odd.to(SCALE_DTYPE)[:, None, :]
        if not EXACT:
            low0, low1 = low0 * factor, low1 * factor
        return scale0, scale1, low0, low1, like, tl.full((1, 1, 1), 1024, tl.float16)
    elif ELEMENT >= 0:
        zero = tl.zeros((8 * WARPS, 1, 4), tl.float16)
        return scale0, scale1, zero, zero, like
    elif SYMMETRIC and BITS == 1:
        # One bit is at position 1: 2 q - 1, with half the scale.
        zero = tl.full((8 * WARPS, 1, 4), 1024 + 1, tl.float16)
        return scale0 * 0.5, scale1 * 0.5, zero, zero, like
    elif SYMMETRIC:
        zero = tl.full((8 * WARPS, 1, 4), 1024 + (1 << (BITS - 1)), tl.float16)
        return scale0, scale1, zero, zero, like
    else:
        even, odd = load_fields(zero_ptr, group, row_block, row_block_mask, row_blocks, zero_bits(BITS), WARPS)
        zero0 = (even | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)[:, None, :]
        zero1 = (odd | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)[:, None, :]
        return scale0, scale1, zero0, zero1, like


@triton.jit
def dequantize_kernel(
    words_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    first_block,
    N,
    row_blocks,
    out_stride,
    factor,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SCALE: tl.constexpr,
    EXACT: tl.constexpr,
    ELEMENT: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Writes 64 * WARPS rows and 64 columns of the weight; grid (rows, tiles).

    Args:
        words_ptr, scale_ptr, zero_ptr: As in ``multiply_weight``.
        out_ptr: [N, K padded to a multiple of 64] float16 or bfloat16, float32 under the interpreter.
        first_block: Block of 8 rows of the weight where the output begins.
        N: Rows of the output.
        row_blocks: Blocks of 8 rows of the weight.
        out_stride: Elements from one row to the next.
        factor: What the weight is multiplied by, float32.
        BITS, GROUP_SIZE, SYMMETRIC, SCALE, ELEMENT, WARPS: As in ``multiply_weight``.
        EXACT: As in ``load_affine``.
    """
    first_row = tl.program_id(0) * (64 * WARPS)
    tile = tl.program_id(1)
    row_block = first_block + first_row // 8 + tl.arange(0, 8 * WARPS)
    mask = row_block < row_blocks
    POSITION: tl.constexpr = 1 if SYMMETRIC and BITS == 1 else 0
    like = tl.zeros((1, 1, 1), out_ptr.dtype.element_ty)
    base_bits = tl.full((8 * WARPS, 1, 1), 0x64006400, tl.uint32)
    words = load_words(words_ptr, tile, row_block, mask, row_blocks, BITS)
    PARTS: tl.constexpr = 4 if GROUP_SIZE == 16 else 2
    CODES: tl.constexpr = 64 // PARTS
    for part in tl.static_range(PARTS):
        if GROUP_SIZE == 0:
            group = 0
        else:
            group = (tile * 64 + part * CODES) // GROUP_SIZE
        affine = load_affine(
            scale_ptr,
            zero_ptr,
            group,
            row_block,
            mask,
            row_blocks,
            like,
            factor,
            BITS,
            SYMMETRIC,
            SCALE,
            EXACT,
            ELEMENT,
            WARPS,
        )  # fmt: skip
        weight = operand(words, base_bits, affine, part, PARTS, BITS, POSITION, ELEMENT, tl.float16, WARPS)
        # Tile order (v, warp, j, g): each row is put where it belongs.
        place = tl.arange(0, 64 * WARPS)
        row_in_block = place // (16 * WARPS) * 2 + place // 8 % 2
        row = first_row + (place // 16 % WARPS * 8 + place % 8) * 8 + row_in_block
        column = tile * 64 + part * CODES + tl.arange(0, CODES)
        offset = row.to(tl.int64)[:, None] * out_stride + column[None, :]
        tl.store(out_ptr + offset, weight, mask=row[:, None] < N)
