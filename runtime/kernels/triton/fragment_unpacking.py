"""Device code: from packed words to the operand of a tensor core, without arithmetic.

A code q of ``BITS`` bits is put into the mantissa of a 16-bit float whose exponent makes the mantissa's last bit
worth 1: the float is BASE + 2**POSITION * q with BASE = 1024 for float16 (10 mantissa bits) and 128 for bfloat16 (7,
so not for codes of 8 bits).
So a pair costs a shift and one three-input logic operation, and scale and zero point wait for the accumulator. POSITION
is the highest place in the half-word where a whole code lies: there the pair needs no shift, and BASE is fewest steps
of q away, which keeps the cancellation of BASE small.

A float of few bits (E exponent bits, at most 5, M mantissa bits) is a float16 but for its bias: its sign goes to bit 15
and the rest to bit 10 - M, which makes 2**(bias - 15) of its value, subnormal numbers included. Again nothing is
converted; ELEMENT is M for such codes and -1 for integers.

The operand has its rows in *tile order*: row i = (v, warp, j, g) of a tile of BLOCK_N = 64 * WARPS rows stands for
row 8 (8 warp + g) + 2 v + j of the weight. In that order every ``join`` and ``permute`` below is a renaming of
registers: thread g of a warp already holds what the tensor core wants from it.
"""

# Annotations in device code are read by Triton, and most arguments are tensors of many types.
import triton
import triton.language as tl


@triton.jit
def shift_right(words, AMOUNT: tl.constexpr):
    """Returns uint32 words moved right by AMOUNT bits, or left when it is negative."""
    if AMOUNT > 0:
        return words >> AMOUNT
    elif AMOUNT < 0:
        return words << (-AMOUNT)
    else:
        return words


@triton.jit
def spare_run(words, INDEX: tl.constexpr, LOW: tl.constexpr, BITS: tl.constexpr, POSITION: tl.constexpr):
    """Returns the run of spare bits that begins at bit LOW of a code, in its place; zero if none begins there."""
    FILLED: tl.constexpr = 16 // BITS * BITS
    SPARE: tl.constexpr = 16 - FILLED
    BEGINS: tl.constexpr = (LOW == 0) or (INDEX % SPARE == 0)
    RUN: tl.constexpr = min(SPARE - INDEX % SPARE, BITS - LOW) if BEGINS else 0
    FIELD: tl.constexpr = (((1 << RUN) - 1) << (POSITION + LOW)) * 0x10001
    return shift_right(words[INDEX // SPARE], FILLED + INDEX % SPARE - POSITION - LOW) & FIELD


@triton.jit
def float_bits(code, AT: tl.constexpr, BITS: tl.constexpr, ELEMENT: tl.constexpr):
    """Returns the codes of BITS bits at bit AT of both halves as float16 bits (see the head of this file)."""
    PLACE: tl.constexpr = 10 - ELEMENT
    MAGNITUDE: tl.constexpr = (((1 << (BITS - 1)) - 1) << PLACE) * 0x10001
    if PLACE + BITS == 16:
        return shift_right(code, AT - PLACE) & (MAGNITUDE | 0x80008000)
    else:
        sign = shift_right(code, AT + BITS - 16) & 0x80008000
        return (shift_right(code, AT - PLACE) & MAGNITUDE) | sign


@triton.jit
def pair_floats(
    words,
    base_bits,
    affine,
    PAIR: tl.constexpr,
    BITS: tl.constexpr,
    POSITION: tl.constexpr,
    ELEMENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Returns the codes of a pair as floats [r, q, v, 2], l last.

    Args:
        words: The BITS words of each thread.
        base_bits: The exponent of BASE in both halves; not read for floats.
        affine: () for code floats; for weights s (q - z), the scales of the rows j = 0 and j = 1 and their zero points
            as code floats, each [r, 1, v], and a tensor of the type that the weights are rounded to; for codes of two
            values these, of the code 1 where scales are and of the code 0 where zero points are, and BASE besides.
        PAIR: Which of the 16 pairs.
        BITS, POSITION, DTYPE: Width of the codes, which are put at POSITION in floats of DTYPE.
        ELEMENT: Mantissa bits of a code that is a float, -1 for integers.
    """
    SLOTS: tl.constexpr = 16 // BITS
    IN_SLOT: tl.constexpr = PAIR < BITS * SLOTS
    # Floats are taken apart further, so their spare bits are put together at the bottom.
    AT: tl.constexpr = POSITION if ELEMENT < 0 else 0
    if IN_SLOT and ELEMENT < 0:
        FIELD: tl.constexpr = (((1 << BITS) - 1) << POSITION) * 0x10001
        field = shift_right(words[PAIR // SLOTS], PAIR % SLOTS * BITS - POSITION) & FIELD
    elif IN_SLOT:
        field = float_bits(words[PAIR // SLOTS], PAIR % SLOTS * BITS, BITS, ELEMENT)
    else:
        field = spare_run(words, (PAIR - BITS * SLOTS) * BITS, 0, BITS, AT)
        for low in tl.static_range(1, BITS):
            field |= spare_run(words, (PAIR - BITS * SLOTS) * BITS + low, low, BITS, AT)
        if ELEMENT >= 0:
            field = float_bits(field, 0, BITS, ELEMENT)
    floats = field | base_bits if ELEMENT < 0 else field
    first = (floats & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
    second = (floats >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    if len(affine) == 0:
        return tl.join(first, second)
    elif len(affine) == 6:
        high, low, base = affine[PAIR % 2], affine[2 + PAIR % 2], affine[5]
        first = tl.where(first > base, high, low).to(affine[4].dtype)
        second = tl.where(second > base, high, low).to(affine[4].dtype)
        return tl.join(first, second)
    else:
        scale, zero = affine[PAIR % 2], affine[2 + PAIR % 2]
        first = ((first - zero).to(scale.dtype) * scale).to(affine[4].dtype)
        second = ((second - zero).to(scale.dtype) * scale).to(affine[4].dtype)
        return tl.join(first, second)


@triton.jit
def join_quarter(
    words,
    base_bits,
    affine,
    QUARTER: tl.constexpr,
    BITS: tl.constexpr,
    POSITION: tl.constexpr,
    ELEMENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Returns the four pairs of k = 16 QUARTER .. 16 QUARTER + 15 as [r, q, v, l, j, h]."""
    FIRST: tl.constexpr = 4 * QUARTER
    return tl.join(
        tl.join(
            pair_floats(words, base_bits, affine, FIRST + 0, BITS, POSITION, ELEMENT, DTYPE),
            pair_floats(words, base_bits, affine, FIRST + 1, BITS, POSITION, ELEMENT, DTYPE),
        ),
        tl.join(
            pair_floats(words, base_bits, affine, FIRST + 2, BITS, POSITION, ELEMENT, DTYPE),
            pair_floats(words, base_bits, affine, FIRST + 3, BITS, POSITION, ELEMENT, DTYPE),
        ),
    )


@triton.jit
def join_half(
    words,
    base_bits,
    affine,
    HALF: tl.constexpr,
    BITS: tl.constexpr,
    POSITION: tl.constexpr,
    ELEMENT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Returns the eight pairs of k = 32 HALF .. 32 HALF + 31 as [r, q, v, l, j, h, t mod 2]."""
    return tl.join(
        join_quarter(words, base_bits, affine, 2 * HALF, BITS, POSITION, ELEMENT, DTYPE),
        join_quarter(words, base_bits, affine, 2 * HALF + 1, BITS, POSITION, ELEMENT, DTYPE),
    )


@triton.jit
def operand(
    words,
    base_bits,
    affine,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    POSITION: tl.constexpr,
    ELEMENT: tl.constexpr,
    DTYPE: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Returns part PART of PARTS (1, 2 or 4) of a tile, [64 * WARPS, 64 // PARTS], rows in tile order."""
    if PARTS == 4:
        pairs = join_quarter(words, base_bits, affine, PART, BITS, POSITION, ELEMENT, DTYPE)
        split = tl.reshape(pairs, (WARPS, 8, 4, 4, 2, 2, 2))  # warp, g, q, v, l, j, h
        return tl.reshape(tl.permute(split, (3, 0, 5, 1, 6, 2, 4)), (64 * WARPS, 16))
    elif PARTS == 2:
        pairs = join_half(words, base_bits, affine, PART, BITS, POSITION, ELEMENT, DTYPE)
        split = tl.reshape(pairs, (WARPS, 8, 4, 4, 2, 2, 2, 2))  # warp, g, q, v, l, j, h, t
        return tl.reshape(tl.permute(split, (3, 0, 5, 1, 7, 6, 2, 4)), (64 * WARPS, 32))
    else:
        pairs = tl.join(
            join_half(words, base_bits, affine, 0, BITS, POSITION, ELEMENT, DTYPE),
            join_half(words, base_bits, affine, 1, BITS, POSITION, ELEMENT, DTYPE),
        )
        split = tl.reshape(pairs, (WARPS, 8, 4, 4, 2, 2, 2, 2, 2))  # warp, g, q, v, l, j, h, t mod 2, t // 2
        return tl.reshape(tl.permute(split, (3, 0, 5, 1, 8, 7, 6, 2, 4)), (64 * WARPS, 64))


@triton.jit
def to_tile_order(values, WARPS: tl.constexpr):
    """Returns values [8 * WARPS, 8] of (row // 8, row mod 8) as [64 * WARPS] in tile order."""
    return tl.reshape(tl.permute(tl.reshape(values, (WARPS, 8, 4, 2)), (2, 0, 3, 1)), (64 * WARPS,))


@triton.jit
def from_tile_order(values, WARPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Returns values [64 * WARPS, BLOCK_M] with the rows of the weight in their own order."""
    split = tl.reshape(values, (4, WARPS, 2, 8, BLOCK_M))  # v, warp, j, g
    return tl.reshape(tl.permute(split, (1, 3, 0, 2, 4)), (64 * WARPS, BLOCK_M))
