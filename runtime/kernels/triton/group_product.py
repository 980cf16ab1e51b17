"""Device code: what one tile of codes adds to a program's result, and the scales and zero points of a group.

With code floats c = BASE + STEP q (``fragment_unpacking``) and W = s (q - z), the sum over the k of one group is

    sum_k x_k W_k = s / STEP * (sum_k x_k c_k - (BASE + STEP z) sum_k x_k).

For floats of few bits c is the weight but for a power of two, and the second sum is not needed. One bit of two free
values, W = low + (high - low) q, has s = high - low, z = 0 and low sum_k x_k besides.

The tensor core takes c as it is. The sum of x comes from a product with ones: it has the same rounding as the first sum
and lies where it is needed. Results are computed transposed, W x': 16 rows of the weight then share an instruction with
8 rows of x, half the instructions of the usual order for few rows of x. All results are in tile order.
"""

import triton
import triton.language as tl

from runtime.kernels.triton import fragment_layout
from runtime.kernels.triton.fragment_unpacking import operand, to_tile_order

zero_bits = triton.constexpr_function(fragment_layout.find_zero_bits)
TWO_VALUES = tl.constexpr(fragment_layout.TWO_VALUES)


@triton.constexpr_function
def find_position(bits, mantissa_bits):
    """Returns the highest bit where a whole code begins that ends inside the mantissa."""
    return max(first for first in range(0, 16 - bits + 1, bits) if first + bits <= mantissa_bits)


@triton.constexpr_function
def count_mantissa_bits(dtype):
    """Returns 10 for float16 and 7 for bfloat16."""
    return 7 if dtype == tl.bfloat16 else 10


@triton.jit
def multiply_add(a, b, accumulator, UPCAST: tl.constexpr):
    """Returns accumulator + a b. The interpreter has no bfloat16 arithmetic: UPCAST multiplies in float32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    else:
        return tl.dot(a, b, accumulator)


@triton.jit
def load_scale_rows(scale_ptr, group, row_block, row_block_mask, row_blocks, SCALE: tl.constexpr, WARPS: tl.constexpr):
    """Returns the scales of a group, of rows j = 0 and of j = 1: [8 * WARPS, 4] of v, float32 for powers of two.

    Of the other types float16, 2**-8 of the scale for E4M3, the value of the code 1 for two values. Whole words are
    read: only these are copied ahead of their use.
    """
    if SCALE == "fp16" or SCALE == TWO_VALUES:
        offset = group * row_blocks * 4 + row_block[:, None] * 4 + tl.arange(0, 4)[None, :]
        words = tl.load(scale_ptr + offset, mask=row_block_mask[:, None], other=0).to(tl.uint32, bitcast=True)
        even = (words & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        odd = (words >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        return even, odd
    else:
        even, odd = load_fields(scale_ptr, group, row_block, row_block_mask, row_blocks, 8, WARPS)
        if SCALE == "e8m0":
            return (even << 23).to(tl.float32, bitcast=True), (odd << 23).to(tl.float32, bitcast=True)
        else:
            even = (even << 7).to(tl.uint16).to(tl.float16, bitcast=True)
            return even, (odd << 7).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def load_scale(scale_ptr, group, row_block, row_block_mask, row_blocks, WARPS: tl.constexpr, SCALE: tl.constexpr):
    """Returns the scales of a group as ``load_scale_rows`` does, [64 * WARPS] in tile order."""
    even, odd = load_scale_rows(scale_ptr, group, row_block, row_block_mask, row_blocks, SCALE, WARPS)
    return to_tile_order(tl.join(even, odd), WARPS)


@triton.jit
def load_fields(ptr, group, row_block, row_block_mask, row_blocks, WIDTH: tl.constexpr, WARPS: tl.constexpr):
    """Returns numbers of 1, 2, 4 or 8 bits for each row, of rows j = 0 and of j = 1: uint32 [8 * WARPS, 4] of v."""
    if WIDTH == 8:
        offset = group * row_blocks * 2 + row_block[:, None] * 2 + tl.arange(0, 2)[None, :]
        words = tl.load(ptr + offset, mask=row_block_mask[:, None], other=0).to(tl.uint32, bitcast=True)
        # Byte 2 (v mod 2) + j of word v // 2.
        even = tl.join(words & 0xFF, (words >> 16) & 0xFF)
        odd = tl.join((words >> 8) & 0xFF, words >> 24)
    else:
        # Several blocks of 8 rows share a word, which each loads for itself: only whole words are copied ahead.
        SHARED: tl.constexpr = 4 // WIDTH
        offset = group * tl.cdiv(row_blocks, SHARED) + row_block // SHARED
        word = tl.load(ptr + offset, mask=row_block_mask, other=0).to(tl.uint32, bitcast=True)
        if SHARED > 1:
            word = word >> (row_block % SHARED * (8 * WIDTH))
        MASK: tl.constexpr = (1 << WIDTH) - 1
        even = tl.join(
            tl.join(word & MASK, (word >> 4 * WIDTH) & MASK),
            tl.join((word >> 2 * WIDTH) & MASK, (word >> 6 * WIDTH) & MASK),
        )
        odd = tl.join(
            tl.join((word >> WIDTH) & MASK, (word >> 5 * WIDTH) & MASK),
            tl.join((word >> 3 * WIDTH) & MASK, (word >> 7 * WIDTH) & MASK),
        )
    return tl.reshape(even, (8 * WARPS, 4)), tl.reshape(odd, (8 * WARPS, 4))


@triton.jit
def load_zero_codes(zero_ptr, group, row_block, row_block_mask, row_blocks, BITS: tl.constexpr, WARPS: tl.constexpr):
    """Returns the zero points of a group as they are stored, uint32 [64 * WARPS] in tile order."""
    even, odd = load_fields(zero_ptr, group, row_block, row_block_mask, row_blocks, zero_bits(BITS), WARPS)
    return to_tile_order(tl.join(even, odd), WARPS)


@triton.jit
def load_zero(
    zero_ptr,
    group,
    row_block,
    row_block_mask,
    row_blocks,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    POSITION: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Returns BASE + STEP z of a group in float32, [64 * WARPS] in tile order, made without a conversion."""
    if SYMMETRIC:
        # Halfway between its two codes for one bit.
        ZERO: tl.constexpr = 0.5 if BITS == 1 else 1 << (BITS - 1)
        return tl.full((64 * WARPS,), (1 << MANTISSA) + (1 << POSITION) * ZERO, tl.float32)
    else:
        zero = load_zero_codes(zero_ptr, group, row_block, row_block_mask, row_blocks, BITS, WARPS)
        # The float 2**e has 127 + e in its exponent, and its mantissa begins at bit 23 - e for whole numbers.
        BASE_BITS: tl.constexpr = (127 + MANTISSA) << 23
        return ((zero << (23 - MANTISSA + POSITION)) | BASE_BITS).to(tl.float32, bitcast=True)


@triton.jit
def load_words(words_ptr, tile, row_block, row_block_mask, row_blocks, BITS: tl.constexpr):
    """Returns the BITS words of each thread for a tile: a tuple of uint32 [8 * WARPS, 4, 4]."""
    thread = tl.arange(0, 4)[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    inner = row_block[:, None, None] * 16 + thread
    words = ()
    for word in tl.static_range(BITS):
        start = words_ptr + tl.cast(tile * BITS + word, tl.int64) * (row_blocks * 16)
        loaded = tl.load(start + inner, mask=row_block_mask[:, None, None], other=0)
        words = words + (loaded.to(tl.uint32, bitcast=True),)
    return words


@triton.jit
def add_products(
    products,
    words,
    base_bits,
    x,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    POSITION: tl.constexpr,
    ELEMENT: tl.constexpr,
    WARPS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Returns the sums of a group after one more tile or part of a tile.

    ``products`` is (of x c, of x), float32: [64 * WARPS, BLOCK_M], and [16 * WARPS, BLOCK_M] for the sums of x, the
    same in every row. Floats have no BASE and no zero point, so they need no sums.
    """
    DTYPE: tl.constexpr = x.dtype
    codes = operand(words, base_bits, (), PART, PARTS, BITS, POSITION, ELEMENT, DTYPE, WARPS)
    sums = products[1]
    if ELEMENT < 0:
        ones = tl.full((16 * WARPS, x.shape[0]), 1.0, tl.float32 if UPCAST else DTYPE)
        sums = multiply_add(ones, x, sums, UPCAST)
    return multiply_add(codes, x, products[0], UPCAST), sums


@triton.jit
def scale_products(
    products,
    scale_ptr,
    zero_ptr,
    group,
    row_block,
    row_block_mask,
    row_blocks,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    POSITION: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SCALE: tl.constexpr,
    ELEMENT: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Returns STEP sum_k x_k W_k of a group, [64 * WARPS, BLOCK_M] float32, of its sums (``add_products``)."""
    scale = load_scale(scale_ptr, group, row_block, row_block_mask, row_blocks, WARPS, SCALE).to(tl.float32)
    if ELEMENT >= 0:
        return scale[:, None] * products[0]
    else:
        # Tile order counts v slowest, so four copies of the sums lie one below the other.
        BLOCK_M: tl.constexpr = products[0].shape[1]
        sums = tl.broadcast_to(products[1][None, :, :], (4, 16 * WARPS, BLOCK_M))
        sums = tl.reshape(sums, (64 * WARPS, BLOCK_M))
        if SCALE == TWO_VALUES:
            low = load_scale(zero_ptr, group, row_block, row_block_mask, row_blocks, WARPS, SCALE).to(tl.float32)
            above = (scale - low)[:, None] * (products[0] - (1 << MANTISSA) * sums)
            return above + ((1 << POSITION) * low)[:, None] * sums
        else:
            zero = load_zero(
                zero_ptr, group, row_block, row_block_mask, row_blocks, BITS, MANTISSA, POSITION, SYMMETRIC, WARPS
            )
            return scale[:, None] * (products[0] - zero[:, None] * sums)
