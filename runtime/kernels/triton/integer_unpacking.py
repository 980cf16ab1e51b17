"""Device code: from packed words to the operand of an integer tensor core, four codes a register.

In an integer product (mma.m16n8k32) a thread's register holds four neighbouring k of a row as bytes. The packed words
hold pairs of codes, one in each half (``fragment_layout``); two pairs of one row make the four bytes: the codes of the
first pair in bytes 0 and 2, those of the second in bytes 1 and 3. Which k those are does not matter as long as the
activations have the same order, and they are written in it (``activation_rounding_kernel``).

The two pairs are chosen so that they lie eight bits apart in one word where a width allows it: then a shift and a mask
unpack four codes. With k = 16 t + 8 h + 2 q + l that is h = 0 and 1 for 4 bits, t and t + 1 for 2 bits, t and t + 2 for
1 bit; other widths take h. QUAD_STEP says how far apart in k the two pairs are: 8, 16 or 32. In the operand the bit of
k that QUAD_STEP names is the lowest, the others keep their order:

    k' = 32 s + 16 u + 4 q + 2 l + e,    k = QUAD_STEP e + (two of 32, 16, 8 that are left, by s and u) + 2 q + l.

Codes of up to 7 bits are bytes as they are; of 8 bits, less 128. Rows are in tile order, as in ``fragment_unpacking``.

``unknown_zero`` is zero, which the compiler cannot know. Were the bits around the codes known to it, it would take each
byte from the words by itself, in up to six instructions a register; so the bytes of a register are a renaming.
"""

import triton
import triton.language as tl

from runtime.kernels.triton.fragment_unpacking import shift_right, spare_run


@triton.constexpr_function
def find_quad_step(bits, group_size):
    """Returns the k between the two pairs of a register; a group of 32 must stay together."""
    steps = {4: 8, 2: 16, 1: 8 if group_size == 32 else 32}
    return steps.get(bits, 8)


@triton.constexpr_function
def find_other_steps(quad_step):
    """Returns the k of the bits s and u."""
    high, low = (step for step in (32, 16, 8) if step != quad_step)
    return high, low


@triton.jit
def code_at(words, PAIR: tl.constexpr, BITS: tl.constexpr, AT: tl.constexpr):
    """Returns the codes of a pair at bit AT of both halves, zeros around them."""
    SLOTS: tl.constexpr = 16 // BITS
    if PAIR < BITS * SLOTS:
        FIELD: tl.constexpr = (((1 << BITS) - 1) << AT) * 0x10001
        return shift_right(words[PAIR // SLOTS], PAIR % SLOTS * BITS - AT) & FIELD
    else:
        field = spare_run(words, (PAIR - BITS * SLOTS) * BITS, 0, BITS, AT)
        for low in tl.static_range(1, BITS):
            field |= spare_run(words, (PAIR - BITS * SLOTS) * BITS + low, low, BITS, AT)
        return field


@triton.jit
def quad_bytes(
    words, unknown_zero, FIRST: tl.constexpr, SECOND: tl.constexpr, BITS: tl.constexpr, POSITION: tl.constexpr
):
    """Returns the codes of two pairs, moved left by POSITION, as bytes [r, q, v, e, l] int8."""
    SLOTS: tl.constexpr = 16 // BITS
    TOGETHER: tl.constexpr = (SECOND - FIRST) * BITS == 8 and FIRST // SLOTS == SECOND // SLOTS and 16 % BITS == 0
    if TOGETHER:
        FIELD: tl.constexpr = (((1 << BITS) - 1) << POSITION) * 0x1010101
        quad = shift_right(words[FIRST // SLOTS], FIRST % SLOTS * BITS - POSITION) & FIELD | unknown_zero
    else:
        LESS: tl.constexpr = 0x80808080 if BITS == 8 else 0
        first = code_at(words, FIRST, BITS, POSITION) ^ (unknown_zero | LESS)
        quad = first ^ code_at(words, SECOND, BITS, 8 + POSITION)
    return tl.join(
        tl.join(quad.to(tl.int8), (quad >> 8).to(tl.int8)),
        tl.join((quad >> 16).to(tl.int8), (quad >> 24).to(tl.int8)),
    )


@triton.jit
def join_rows(
    words, unknown_zero, T1: tl.constexpr, BITS: tl.constexpr, POSITION: tl.constexpr, QUAD_STEP: tl.constexpr
):
    """Returns the quads of 32 codes, those of s = T1, as [r, q, v, e, l, j, u]."""
    # A pair is 4 t + 2 h + j: its number is k / 4 + j.
    S_STEP: tl.constexpr = find_other_steps(QUAD_STEP)[0] // 4
    U_STEP: tl.constexpr = find_other_steps(QUAD_STEP)[1] // 4
    FIRST: tl.constexpr = T1 * S_STEP
    APART: tl.constexpr = QUAD_STEP // 4
    return tl.join(
        tl.join(
            quad_bytes(words, unknown_zero, FIRST, FIRST + APART, BITS, POSITION),
            quad_bytes(words, unknown_zero, FIRST + 1, FIRST + 1 + APART, BITS, POSITION),
        ),
        tl.join(
            quad_bytes(words, unknown_zero, FIRST + U_STEP, FIRST + U_STEP + APART, BITS, POSITION),
            quad_bytes(words, unknown_zero, FIRST + U_STEP + 1, FIRST + U_STEP + 1 + APART, BITS, POSITION),
        ),
    )


@triton.jit
def integer_operand(
    words,
    unknown_zero,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    POSITION: tl.constexpr,
    QUAD_STEP: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Returns part PART of PARTS (1 or 2) of a tile, [64 * WARPS, 64 // PARTS] int8, rows in tile order."""
    if PARTS == 2:
        quads = join_rows(words, unknown_zero, PART, BITS, POSITION, QUAD_STEP)
        split = tl.reshape(quads, (WARPS, 8, 4, 4, 2, 2, 2, 2))  # warp, g, q, v, e, l, j, u
        return tl.reshape(tl.permute(split, (3, 0, 6, 1, 7, 2, 5, 4)), (64 * WARPS, 32))
    else:
        quads = tl.join(
            join_rows(words, unknown_zero, 0, BITS, POSITION, QUAD_STEP),
            join_rows(words, unknown_zero, 1, BITS, POSITION, QUAD_STEP),
        )
        split = tl.reshape(quads, (WARPS, 8, 4, 4, 2, 2, 2, 2, 2))  # warp, g, q, v, e, l, j, u, s
        return tl.reshape(tl.permute(split, (3, 0, 6, 1, 8, 7, 2, 5, 4)), (64 * WARPS, 64))
