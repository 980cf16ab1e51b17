"""Device code: past keys or values from their packed rows to floats, as a cache holds them (``runtime.packed_states``).

A row is a token of a head (head_dim codes), or a channel of a block of tokens. Its codes are a dense stream of bits,
so 32 of them are BITS words of 32 bits and begin at a word: a thread reads these words and takes each code out with a
shift and a mask that are known when the kernel is compiled. A code becomes a float in the mantissa of 2**23; less
2**23 + z and times the scale it is the number that the reference gives, rounded to the type of the query. For float16
the mantissa of 2**10 gives the same, as a scale is one too, and of 2, 4 and 8 bits two codes at once.

STATES describes the rows: (bits, group size or 0 for the whole row, symmetric, tokens of a block or 0), bits 16 for
float16 or bfloat16 numbers as they are.
"""

import triton
import triton.language as tl


@triton.jit
def load_words(words_ptr, offset, mask, BITS: tl.constexpr):
    """Returns the BITS words at offset [rows, chunks], each uint32 of that shape; up to four are one load."""
    words = ()
    if BITS % 4 == 0:
        for i in tl.static_range(BITS // 4):
            four = tl.load(words_ptr + offset[:, :, None] + (4 * i + tl.arange(0, 4)), mask=mask[:, :, None], other=0)
            four = four.to(tl.uint32, bitcast=True)
            even, odd = tl.split(tl.reshape(four, (offset.shape[0], offset.shape[1], 2, 2)))
            first, third = tl.split(even)
            second, fourth = tl.split(odd)
            words = words + (first, second, third, fourth)
    elif BITS % 2 == 0:
        for i in tl.static_range(BITS // 2):
            two = tl.load(words_ptr + offset[:, :, None] + (2 * i + tl.arange(0, 2)), mask=mask[:, :, None], other=0)
            first, second = tl.split(two.to(tl.uint32, bitcast=True))
            words = words + (first, second)
    else:
        for i in tl.static_range(BITS):
            one = tl.load(words_ptr + offset + i, mask=mask, other=0)
            words = words + (one.to(tl.uint32, bitcast=True),)
    return words


@triton.constexpr_function
def find_steps(bits, dtype):
    """Returns how far apart the codes of each of the five joins are: the first two codes, and so on.

    Of 2, 4 and 8 bits the first are 16 bits apart, and float16 numbers are made of both at once.
    """
    apart = 16 // bits if dtype == tl.float16 and 16 % bits == 0 else 16
    return (apart, *(step for step in (16, 8, 4, 2, 1) if step != apart))


@triton.constexpr_function
def find_order(steps):
    """Returns the axes of the five joins, after two others, from the greatest step to the least."""
    return (0, 1, *(2 + steps.index(step) for step in (16, 8, 4, 2, 1)))


@triton.jit
def code_float(words, base_bits, scale, zero, INDEX: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Returns code INDEX of 32 as a number, [rows, chunks]."""
    WORD: tl.constexpr = INDEX * BITS // 32
    SHIFT: tl.constexpr = INDEX * BITS % 32
    field = words[WORD] >> SHIFT
    if SHIFT + BITS > 32:
        field |= words[WORD + 1] << (32 - SHIFT)
    code = ((field & ((1 << BITS) - 1)) | base_bits).to(tl.float32, bitcast=True)
    return ((code - zero) * scale).to(DTYPE)


@triton.jit
def join_2(
    words,
    base_bits,
    scale,
    zero,
    INDEX: tl.constexpr,
    STEPS: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Returns two codes from INDEX on, STEPS[0] apart, in a last axis."""
    if STEPS[0] == 16:
        return tl.join(
            code_float(words, base_bits, scale, zero, INDEX, BITS, DTYPE),
            code_float(words, base_bits, scale, zero, INDEX + 16, BITS, DTYPE),
        )
    else:
        FIELD: tl.constexpr = ((1 << BITS) - 1) * 0x10001
        codes = ((words[INDEX * BITS // 32] >> (INDEX * BITS % 32)) & FIELD) | base_bits
        first = (codes & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        second = (codes >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
        return tl.join((first - zero) * scale, (second - zero) * scale)


@triton.jit
def join_4(
    words, base_bits, scale, zero, INDEX: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr
):
    """Returns four codes from INDEX on, in two last axes."""
    return tl.join(
        join_2(words, base_bits, scale, zero, INDEX, STEPS, BITS, DTYPE),
        join_2(words, base_bits, scale, zero, INDEX + STEPS[1], STEPS, BITS, DTYPE),
    )


@triton.jit
def join_8(
    words, base_bits, scale, zero, INDEX: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr
):
    """Returns eight codes from INDEX on, in three last axes."""
    return tl.join(
        join_4(words, base_bits, scale, zero, INDEX, STEPS, BITS, DTYPE),
        join_4(words, base_bits, scale, zero, INDEX + STEPS[2], STEPS, BITS, DTYPE),
    )


@triton.jit
def join_16(
    words, base_bits, scale, zero, INDEX: tl.constexpr, STEPS: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr
):
    """Returns sixteen codes from INDEX on, in four last axes."""
    return tl.join(
        join_8(words, base_bits, scale, zero, INDEX, STEPS, BITS, DTYPE),
        join_8(words, base_bits, scale, zero, INDEX + STEPS[3], STEPS, BITS, DTYPE),
    )


@triton.jit
def unpack_rows(
    words_ptr,
    scale_ptr,
    zero_ptr,
    unknown_zero,
    row,
    chunk,
    mask,
    row_chunks,
    STATES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Returns numbers of packed rows, [rows, 32 * chunks].

    Args:
        words_ptr: [all rows, row_chunks, BITS] int32.
        scale_ptr: [all rows, groups] float16.
        zero_ptr: [all rows, bytes of their zero points] uint8; not read when symmetric.
        unknown_zero: A zero that the compiler cannot know.
        row: [rows, chunks] int64, which rows.
        chunk: [rows, chunks] int32, which 32 codes of them.
        mask: [rows, chunks], those that exist.
        row_chunks: Chunks of a row.
        STATES, DTYPE: Head of this file.
    """
    BITS: tl.constexpr = STATES[0]
    words = load_words(words_ptr, (row * row_chunks + chunk) * BITS, mask, BITS)
    if STATES[1] == 0:
        group, groups = chunk * 0, 1
    else:
        group, groups = chunk * 32 // STATES[1], row_chunks * 32 // STATES[1]
    # Scales of neighbouring rows may be neighbours. Did the compiler know, it would read them by other threads than the
    # words, and send every code to them through shared memory.
    groups += unknown_zero
    scale = tl.load(scale_ptr + row * groups + group, mask=mask, other=0.0)
    if STATES[2]:
        code = tl.full(scale.shape, 1 << (BITS - 1), tl.uint32)
    else:
        zero_bytes = (groups * BITS + 7) // 8
        byte = group * BITS // 8
        place = zero_ptr + row * zero_bytes + byte
        stored = tl.load(place, mask=mask, other=0).to(tl.uint32)
        if 8 % BITS != 0:
            stored |= tl.load(place + 1, mask=mask & (byte + 1 < zero_bytes), other=0).to(tl.uint32) << 8
        code = (stored >> (group * BITS % 8).to(tl.uint32)) & ((1 << BITS) - 1)
    STEPS: tl.constexpr = find_steps(BITS, DTYPE)
    # row >> 63 is zero, which the compiler cannot know: it must keep the exponent in a register of each thread, and the
    # mask of a code and its exponent become one instruction instead of two.
    if STEPS[0] == 16:
        base_bits = (row >> 63).to(tl.uint32) | 0x4B000000
        scale, zero = scale.to(tl.float32), (code | 0x4B000000).to(tl.float32, bitcast=True)
    else:
        base_bits = (row >> 63).to(tl.uint32) | 0x64006400
        zero = (code | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True)
    codes = tl.join(
        join_16(words, base_bits, scale, zero, 0, STEPS, BITS, DTYPE),
        join_16(words, base_bits, scale, zero, STEPS[4], STEPS, BITS, DTYPE),
    )
    return tl.reshape(tl.permute(codes, find_order(STEPS)), (row.shape[0], 32 * row.shape[1]))


@triton.jit
def load_states(
    words_ptr,
    scale_ptr,
    zero_ptr,
    first,
    last,
    head,
    heads,
    STATES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Returns the states of one head and BLOCK tokens from ``first`` on, [BLOCK, DIM], or [DIM, BLOCK] of token blocks.

    Args:
        words_ptr, scale_ptr, zero_ptr: As in ``unpack_rows``; rows are [tokens, heads], or [blocks, heads, DIM].
        first: A multiple of 32.
        last: Where the tokens end that may be read.
        head: Which of the heads of all sequences.
        heads: How many there are.
        STATES, DTYPE: As in ``unpack_rows``.
        DIM: Numbers of a head.
        BLOCK: A multiple of 32.
    """
    unknown_zero = heads >> 31
    if STATES[0] == 16:
        token, dim = first + tl.arange(0, BLOCK), tl.arange(0, DIM)
        offset = (token.to(tl.int64)[:, None] * heads + head) * DIM + dim[None, :]
        # Through float32: the interpreter converts bfloat16 to nothing else.
        return tl.load(words_ptr + offset, mask=(token < last)[:, None], other=0.0).to(tl.float32).to(DTYPE)
    elif STATES[3] == 0:
        token, chunk = (first + tl.arange(0, BLOCK))[:, None], tl.arange(0, DIM // 32)[None, :]
        row = (token.to(tl.int64) * heads + head) + chunk * 0
        return unpack_rows(
            words_ptr,
            scale_ptr,
            zero_ptr,
            unknown_zero,
            row,
            chunk + token * 0,
            (token < last) & (chunk >= 0),
            DIM // 32,
            STATES,
            DTYPE,
        )
    else:
        token, dim = (first + 32 * tl.arange(0, BLOCK // 32))[None, :], tl.arange(0, DIM)[:, None]
        row = ((token // STATES[3]).to(tl.int64) * heads + head) * DIM + dim
        chunk = token % STATES[3] // 32 + dim * 0
        mask = (token < last) & (dim >= 0)
        return unpack_rows(
            words_ptr, scale_ptr, zero_ptr, unknown_zero, row, chunk, mask, STATES[3] // 32, STATES, DTYPE
        )
