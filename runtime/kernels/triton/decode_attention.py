"""Attention of one query token over a cache that stays packed, by the Triton kernels.

What a cache holds is read as it is: rows of codes of a token or of a channel in a block of tokens, or numbers of 16
bits (``runtime.packed_states``). Only tokens whose keys or values wait for their block are read from dense tensors,
together with the query's own.

Runs on a CUDA device, or on the CPU if Triton was imported with TRITON_INTERPRET=1.
"""

import torch
import triton
from torch import Tensor

from runtime.formats import Format
from runtime.kernels.triton.decode_attention_kernel import attention_splits_kernel, sum_attention_kernel
from runtime.kernels.triton.launch_table import AttentionLaunch, find_attention_launch
from runtime.kernels.triton.packed_product import PRODUCT_DTYPES
from runtime.kernels.triton.product_launch import INTERPRETED, find_device
from runtime.packed_rows import PackedRows

States = tuple[int, int, bool, int]
# AMD's matrix instructions take 16 query heads, the others 8.
LEAST_HEADS, LEAST_HEADS_AMD = 8, 16
_MOST_HEAD_BYTES = 512


def fits_attention(rows: PackedRows, dtype: torch.dtype) -> bool:
    """Returns True for states that the kernel reads: integers of 2 to 8 bits with float16 scales, and 16 bits.

    Args:
        rows: The states; their heads have a power of two of numbers.
        dtype: The type of the query.
    """
    format_, dim = rows.format, rows.head_dim
    if dtype not in PRODUCT_DTYPES or dim < 32 or dim * dtype.itemsize > _MOST_HEAD_BYTES or dim & (dim - 1):
        return False
    if format_.kind == "float":
        return True
    length = rows.token_block or dim
    return (
        format_.kind == "int"
        and format_.scale_type == "fp16"
        and 2 <= format_.bits <= 8
        and (format_.group_size is None or (format_.group_size % 32 == 0 and length % format_.group_size == 0))
    )


def decode_attention(
    query: Tensor,
    keys: PackedRows,
    values: PackedRows,
    packed_count: int,
    tail: tuple[Tensor, Tensor],
    mask: Tensor | None,
    scaling: float,
    launch: AttentionLaunch | None = None,
) -> Tensor:
    """Returns the attention of one token [batch, heads, 1, value_dim] in the type of the query.

    Args:
        query: [batch, heads, 1, key_dim].
        keys: Packed keys of past tokens, ``fits_attention``.
        values: Packed values of them.
        packed_count: Past tokens that are read from them.
        tail: Keys [batch, key heads, tokens, key_dim] and values of the tokens after them, the query's own last.
        mask: [batch, all tokens] bool, True where the query sees a token; None for all of them.
        scaling: Factor of the scores.
        launch: How it is launched; None for what ``find_attention_launch`` finds.
    """
    batch, query_heads, _, key_dim = query.shape
    key_heads, value_dim = tail[0].shape[1], tail[1].shape[3]
    heads, shared = batch * key_heads, query_heads // key_heads
    launch = launch or find_attention_launch(
        find_device(query.device), heads, packed_count, key_dim * query.element_size()
    )
    splits = triton.cdiv(packed_count, launch.split_tokens) + 1
    partial = torch.empty((splits, heads, shared, value_dim), dtype=torch.float32, device=query.device)
    totals = torch.empty((2, splits, heads, shared), dtype=torch.float32, device=query.device)
    out = torch.empty((batch, query_heads, 1, value_dim), dtype=query.dtype, device=query.device)
    amd = torch.version.hip is not None
    seen = None if mask is None else mask.contiguous().view(torch.uint8)
    attention_splits_kernel[(heads, splits)](
        query.contiguous(),
        *_list_tensors(keys),
        *_list_tensors(values),
        tail[0].contiguous(),
        tail[1].contiguous(),
        query if seen is None else seen,
        partial,
        totals,
        heads,
        key_heads,
        packed_count,
        tail[0].shape[2],
        launch.split_tokens,
        0 if seen is None else seen.stride(0),
        scaling,
        KEYS=describe_states(keys.format, keys.token_block),
        VALUES=describe_states(values.format, values.token_block),
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        SHARED=shared,
        BLOCK_H=max(LEAST_HEADS_AMD if amd else LEAST_HEADS, triton.next_power_of_2(shared)),
        BLOCK=launch.block_tokens,
        STAGES=launch.stages,
        HAS_MASK=seen is not None,
        PRECISION=find_precision(query.dtype, amd=amd),
        UPCAST=INTERPRETED,
        num_warps=launch.warps,
        maxnreg=launch.max_registers,
    )
    sum_attention_kernel[(heads * shared,)](
        partial, totals, out, heads * shared, splits, VALUE_DIM=value_dim, num_warps=1
    )
    return out


def find_precision(dtype: torch.dtype, *, amd: bool) -> str:
    """Returns how numbers of a type are multiplied: as they are, but float32 by tensor cores where there is a way."""
    return "tf32x3" if dtype == torch.float32 and not amd else "ieee"


def describe_states(format_: Format, token_block: int) -> States:
    """Returns (bits, group size or 0, symmetric, tokens of a block or 0) of rows, as the kernel takes them."""
    if format_.kind == "float":
        return 16, 0, True, 0
    return format_.bits, format_.group_size or 0, format_.symmetric, token_block


def _list_tensors(rows: PackedRows) -> tuple[Tensor, Tensor, Tensor]:
    """Returns words, scales and zero points; those that do not exist are not read."""
    if rows.format.kind == "float":
        [numbers] = rows.buffers.values()
        return numbers, numbers, numbers
    codes, scale = rows.buffers["codes"], rows.buffers["scale"]
    return codes.view(torch.int32), scale, rows.buffers.get("zero_point", scale)
