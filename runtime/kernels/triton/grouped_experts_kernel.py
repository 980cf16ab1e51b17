"""Device code: the product of every routed token with its expert in one launch, experts of different formats included.

A program takes a few tokens of one expert. Which kind of weight the expert has (integers or floats, width, group size,
scales, zero points) is the same for all threads of a program, so the choice is one branch; a launch needs the registers
of its widest member and no more. Nothing is computed for experts that no token takes.
"""

import triton
import triton.language as tl

from runtime.kernels.triton.fragment_unpacking import from_tile_order
from runtime.kernels.triton.weight_only_kernel import multiply_weight


@triton.jit
def multiply_expert(
    x_rows,
    x_mask,
    words_ptr,
    scale_ptr,
    zero_ptr,
    kind,
    first_row_block,
    last_row_block,
    row_blocks,
    tiles,
    KINDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Returns W x' of one expert, [64 * WARPS, BLOCK_M] float32 in tile order, by the code of its kind."""
    total = tl.zeros((64 * WARPS, BLOCK_M), tl.float32)
    for i in tl.static_range(len(KINDS)):
        if kind == i:
            total = multiply_weight(
                x_rows,
                x_mask,
                words_ptr,
                scale_ptr,
                zero_ptr,
                first_row_block,
                last_row_block,
                row_blocks,
                0,
                tiles // KINDS[i][3],
                KINDS[i][0],
                KINDS[i][1],
                KINDS[i][2],
                KINDS[i][4],
                KINDS[i][3],
                BLOCK_M,
                WARPS,
                STAGES,
                UPCAST,
                KINDS[i][5],
            )
    return total


@triton.jit
def grouped_experts_kernel(
    x_ptr,
    token_ptr,
    words_ptr,
    scale_ptr,
    zero_ptr,
    offset_ptr,
    kind_ptr,
    expert_factor_ptr,
    block_expert_ptr,
    block_first_ptr,
    block_last_ptr,
    out_ptr,
    N,
    row_blocks,
    tiles,
    x_stride,
    KINDS: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Computes BLOCK_M slots and 64 * WARPS columns of y = x W' of their expert; grid (columns, blocks of slots).

    A slot is a pair of token and expert; slots are sorted by expert. GATED experts hold the rows of a gate above those
    of an up projection, 2 N in all, and y = silu(gate) * up.

    Args:
        x_ptr: [tokens, K padded to a multiple of 64] float16 or bfloat16.
        token_ptr: [slots] int64, the row of x of each slot.
        words_ptr, scale_ptr, zero_ptr: All experts' words, scales and zero points, one after the other.
        offset_ptr: [experts, 3] int64, where an expert's words, scales and zero points begin, in words.
        kind_ptr: [experts] int32, index into KINDS.
        expert_factor_ptr: [experts] float32, what an expert's weights are multiplied by.
        block_expert_ptr: [blocks] int64, the expert of a block of slots; past the last expert for blocks without one.
        block_first_ptr, block_last_ptr: [blocks] int64, the slots of a block.
        out_ptr: [slots, N].
        N: Columns of y.
        row_blocks: Blocks of 8 rows of an expert.
        tiles: Tiles of 64 codes of a row.
        x_stride: Elements from one row of x to the next.
        KINDS: (bits, group size or 0, symmetric, tiles of a step, type of the scales, mantissa bits of floats or -1) of
            each kind.
        GATED: Apply the gate.
        BLOCK_M, WARPS, STAGES, UPCAST: As in ``multiply_weight``.
    """
    # One program: a block of slots of one expert, and a block of columns.
    block = tl.program_id(1)
    first, last = tl.load(block_first_ptr + block), tl.load(block_last_ptr + block)
    if first >= last:
        return
    expert = tl.load(block_expert_ptr + block)
    first_column = tl.program_id(0) * (64 * WARPS)
    slot = first + tl.arange(0, BLOCK_M)
    slot_mask = slot < last
    token = tl.load(token_ptr + slot, mask=slot_mask, other=0)
    x_rows = x_ptr + token * x_stride
    kind = tl.load(kind_ptr + expert)
    # The hints keep the copies 16 bytes wide: each expert's words are whole tiles.
    words_ptr += tl.multiple_of(tl.load(offset_ptr + expert * 3), 16)
    scale_ptr += tl.multiple_of(tl.load(offset_ptr + expert * 3 + 1), 2)
    zero_ptr += tl.multiple_of(tl.load(offset_ptr + expert * 3 + 2), 2)
    first_block = first_column // 8
    last_block = tl.cdiv(N, 8)
    # One switch for both halves of a gated expert: two of them take the compiler more than twice as long.
    y = tl.zeros((64 * WARPS, BLOCK_M), tl.float32)
    # What a loop carries has its type before it.
    gate = y
    for half in tl.range(0, 2 if GATED else 1, num_stages=1):
        gate = y
        y = multiply_expert(
            x_rows, slot_mask, words_ptr, scale_ptr, zero_ptr, kind, half * last_block + first_block,
            (half + 1) * last_block, row_blocks, tiles, KINDS, BLOCK_M, WARPS, STAGES, UPCAST,
        )  # fmt: skip
    factor = tl.load(expert_factor_ptr + expert)
    y *= factor
    if GATED:
        gate *= factor
        y = gate * tl.sigmoid(gate) * y
    y = from_tile_order(y, WARPS, BLOCK_M)
    column = first_column + tl.arange(0, 64 * WARPS)
    mask = slot_mask[None, :] & (column[:, None] < N)
    tl.store(out_ptr + slot[None, :] * N + column[:, None], y.to(out_ptr.dtype.element_ty), mask=mask)
