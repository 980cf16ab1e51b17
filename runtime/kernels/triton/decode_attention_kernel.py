"""Device code: attention of one query token over a cache that stays packed, the context cut into splits.

A program takes the query heads that share one head of keys, and one range of past tokens. Of its scores
t = scaling * q k^ it keeps the greatest m, the sum of weights l = sum 2^(t - m) and o = sum 2^(t - m) v^ (online
softmax); a second kernel adds the splits in their order,

    y = sum_i 2^(m_i - m) o_i / sum_i 2^(m_i - m) l_i,    m = max m_i,

so every run gives the same bits. The tokens that are not packed, the query's own among them, are a split of their own.
Products are computed transposed, K q' and V' p': 16 tokens or numbers then share an instruction with 8 query heads.

Papers: Dao et al. 2022, FlashAttention, arXiv:2205.14135; the splits are those of Flash-Decoding (Dao et al. 2023).
"""

import triton
import triton.language as tl

from runtime.kernels.triton.cache_unpacking import load_states

_LOG2_E = tl.constexpr(1.4426950408889634)
# Of tokens that are masked: not minus infinity, so that a split without any other stays a number.
_MASKED = tl.constexpr(-1.0e30)


@triton.jit
def multiply(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Returns a b in float32. The interpreter has no bfloat16 arithmetic: UPCAST multiplies in float32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_tokens(
    state, scores, token, last, mask_row, values, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):
    """Returns (o, l, m) after more tokens.

    Args:
        state: o [VALUE_DIM, heads], l [heads], m [heads], float32; scores are in powers of two.
        scores: [tokens, heads].
        token: [tokens].
        last: Where the tokens end.
        mask_row: Pointer to the mask of token 0, read when HAS_MASK.
        values: [VALUE_DIM, tokens].
        HAS_MASK, PRECISION, UPCAST: As in ``attention_splits_kernel``.
    """
    output, total, greatest = state
    exists = token < last
    if HAS_MASK:
        seen = tl.load(mask_row + token, mask=exists, other=0) != 0
        scores = tl.where(seen[:, None], scores, _MASKED)
    scores = tl.where(exists[:, None], scores, -float("inf"))
    new = tl.maximum(greatest, tl.max(scores, axis=0))
    weights = tl.exp2(scores - new[None, :])
    shrink = tl.exp2(greatest - new)
    output = output * shrink[None, :] + multiply(values, weights.to(values.dtype), PRECISION, UPCAST)
    return output, total * shrink + tl.sum(weights, axis=0), new


@triton.jit
def attention_splits_kernel(
    query_ptr,
    key_words_ptr,
    key_scale_ptr,
    key_zero_ptr,
    value_words_ptr,
    value_scale_ptr,
    value_zero_ptr,
    key_tail_ptr,
    value_tail_ptr,
    mask_ptr,
    partial_ptr,
    total_ptr,
    heads,
    key_heads,
    packed_tokens,
    tail_tokens,
    split_tokens,
    mask_stride,
    scaling,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Computes o, l and m of the query heads of one key head over one split; grid (heads, splits + 1).

    Args:
        query_ptr: [heads, SHARED, KEY_DIM] float16, bfloat16 or float32; heads are those of keys, of all sequences.
        key_words_ptr, key_scale_ptr, key_zero_ptr: Rows of packed keys (``cache_unpacking.load_states``).
        value_words_ptr, value_scale_ptr, value_zero_ptr: Those of values.
        key_tail_ptr: [heads, tail_tokens, KEY_DIM], keys that are not packed, in the type of the query.
        value_tail_ptr: [heads, tail_tokens, VALUE_DIM].
        mask_ptr: [sequences, packed_tokens + tail_tokens] uint8, 0 where a token is not seen; read when HAS_MASK.
        partial_ptr: [splits + 1, heads, SHARED, VALUE_DIM] float32.
        total_ptr: [2, splits + 1, heads, SHARED] float32, l and m.
        heads, key_heads: Heads of all sequences, and of one.
        packed_tokens, tail_tokens: Past tokens that are packed, and the others with the query's own.
        split_tokens: Tokens of a split, a multiple of BLOCK.
        mask_stride: Elements from the mask of one sequence to the next.
        scaling: Factor of the scores.
        KEYS, VALUES: Descriptions of their rows (``cache_unpacking``).
        KEY_DIM, VALUE_DIM: Numbers of a head, powers of two from 32 on.
        SHARED: Query heads of a key head.
        BLOCK_H: A power of two, 8 or more, and not below SHARED.
        BLOCK: Tokens that are taken at once, a power of two from 32 on.
        STAGES: Steps that are loaded ahead.
        HAS_MASK: There is a mask.
        PRECISION: How float32 is multiplied: ``tf32x3``, three products of tensor cores, loses what is below 2**-22.
        UPCAST: Multiply in float32 (interpreter).
    """
    # One program: the query heads of one key head, one split.
    head, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    DTYPE: tl.constexpr = query_ptr.dtype.element_ty
    shared, key_dim, value_dim = tl.arange(0, BLOCK_H), tl.arange(0, KEY_DIM), tl.arange(0, VALUE_DIM)
    shared_mask = shared < SHARED
    query_row = head * SHARED + shared
    query = tl.load(query_ptr + query_row[None, :] * KEY_DIM + key_dim[:, None], mask=shared_mask[None, :], other=0.0)
    scaling = scaling * _LOG2_E
    mask_row = mask_ptr + (head // key_heads) * mask_stride
    output, total = tl.zeros((VALUE_DIM, BLOCK_H), tl.float32), tl.zeros((BLOCK_H,), tl.float32)
    greatest = tl.zeros((BLOCK_H,), tl.float32) + _MASKED
    if split < splits - 1:
        last = tl.minimum(packed_tokens, (split + 1) * split_tokens)
        for first in tl.range(split * split_tokens, last, BLOCK, num_stages=STAGES):
            keys = load_states(
                key_words_ptr, key_scale_ptr, key_zero_ptr, first, last, head, heads, KEYS, KEY_DIM, BLOCK, DTYPE
            )
            values = load_states(
                value_words_ptr, value_scale_ptr, value_zero_ptr, first, last, head, heads, VALUES, VALUE_DIM, BLOCK,
                DTYPE,
            )  # fmt: skip
            keys = tl.trans(keys) if KEYS[3] else keys
            values = values if VALUES[3] else tl.trans(values)
            token = first + tl.arange(0, BLOCK)
            scores = multiply(keys, query, PRECISION, UPCAST) * scaling
            output, total, greatest = add_tokens(
                (output, total, greatest), scores, token, last, mask_row, values, HAS_MASK, PRECISION, UPCAST
            )
    else:
        for first in tl.range(0, tail_tokens, BLOCK):
            token = first + tl.arange(0, BLOCK)
            row, mask = (head.to(tl.int64) * tail_tokens + token)[:, None], (token < tail_tokens)[:, None]
            keys = tl.load(key_tail_ptr + row * KEY_DIM + key_dim[None, :], mask=mask, other=0.0)
            values = tl.load(value_tail_ptr + row * VALUE_DIM + value_dim[None, :], mask=mask, other=0.0)
            scores = multiply(keys, query, PRECISION, UPCAST) * scaling
            output, total, greatest = add_tokens(
                (output, total, greatest),
                scores,
                token,
                tail_tokens,
                mask_row + packed_tokens,
                tl.trans(values),
                HAS_MASK,
                PRECISION,
                UPCAST,
            )
    place = (split * heads + head).to(tl.int64) * SHARED + shared
    tl.store(partial_ptr + place[None, :] * VALUE_DIM + value_dim[:, None], output, mask=shared_mask[None, :])
    tl.store(total_ptr + place, total, mask=shared_mask)
    tl.store(total_ptr + splits * heads * SHARED + place, greatest, mask=shared_mask)


@triton.jit
def sum_attention_kernel(partial_ptr, total_ptr, out_ptr, rows, splits, VALUE_DIM: tl.constexpr):
    """Adds the splits of one query head in their order; grid (rows).

    Args:
        partial_ptr: [splits, rows, VALUE_DIM] float32.
        total_ptr: [2, splits, rows] float32, l and m.
        out_ptr: [rows, VALUE_DIM].
        rows: Query heads of all sequences.
        splits: How many splits.
        VALUE_DIM: Numbers of a head.
    """
    row = tl.program_id(0)
    dim = tl.arange(0, VALUE_DIM)
    output, total = tl.zeros((VALUE_DIM,), tl.float32), tl.zeros((1,), tl.float32)
    greatest = tl.zeros((1,), tl.float32) + _MASKED
    for split in tl.range(0, splits):
        place = (split * rows + row).to(tl.int64)
        other = tl.load(total_ptr + splits * rows + place)
        new = tl.maximum(greatest, other)
        shrink, weight = tl.exp2(greatest - new), tl.exp2(other - new)
        output = output * shrink + weight * tl.load(partial_ptr + place * VALUE_DIM + dim)
        total = total * shrink + weight * tl.load(total_ptr + place)
        greatest = new
    tl.store(out_ptr + row * VALUE_DIM + dim, (output / total).to(out_ptr.dtype.element_ty))
