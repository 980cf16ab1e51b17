"""Attention of one token over a cache that stays packed, where the Triton kernels run: nothing past is dequantized.

transformers asks a cache for all keys and values and hands what it gets to the attention. So where a kernel can read
the packed ones, the cache gives the keys and values of this step alone and marks them with what is past
(``mark_past``); the attention (``cached_attention.attend``) finds the mark and calls the kernel.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.kernels import dispatch
from runtime.packed_rows import PackedRows
from runtime.packed_states import PackedStates

_MARK = "bitplan_packed_past"


@dataclass
class Reading:
    """Whether the attention has read what a cache left packed; it outlives the tensors."""

    done: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedPast:
    """What a token attends over.

    Args:
        keys: Packed keys of past tokens.
        values: Packed values; of more tokens than the keys, or fewer, where one of them is in blocks.
        tail: Keys and values [batch, heads, tokens, head_dim] from the first token on that is not packed in both, the
            token's own last.
        packed_count: The tokens before it.
        reading: Whether the attention has read it.
    """

    keys: PackedRows
    values: PackedRows
    tail: tuple[Tensor, Tensor]
    packed_count: int
    reading: Reading = field(default_factory=Reading)


def find_packed_past(keys: PackedStates, values: PackedStates, key: Tensor, value: Tensor) -> PackedPast | None:
    """Returns what one token attends over, or None where no kernel reads it: then it is dequantized.

    Args:
        keys: Past keys.
        values: Past values.
        key: Keys of this step, [batch, heads, tokens, head_dim].
        value: Its values, likewise.
    """
    wants_gradient = key.requires_grad and torch.is_grad_enabled()
    if wants_gradient or torch.compiler.is_compiling() or key.shape[2] != 1 or not keys.token_count:
        return None
    if not dispatch.uses_triton(key.device):
        return None
    # Imported where it is needed: on other machines there may be no Triton.
    from runtime.kernels.triton.decode_attention import fits_attention

    packed_keys, packed_values = keys.packed_rows(), values.packed_rows()
    packed = min(packed_keys.token_count, packed_values.token_count)
    if not packed or not fits_attention(packed_keys, key.dtype) or not fits_attention(packed_values, value.dtype):
        return None
    tail = (
        torch.cat([keys.read(key.dtype, packed), key], dim=2),
        torch.cat([values.read(value.dtype, packed), value], dim=2),
    )
    return PackedPast(keys=packed_keys, values=packed_values, tail=tail, packed_count=packed)


def mark_past(key: Tensor, past: PackedPast) -> Tensor:
    """Returns the keys of a step, marked with what is past."""
    marked = key.view_as(key)
    setattr(marked, _MARK, past)
    return marked


def check_read(reading: Reading | None) -> None:
    """Checks that the attention has read what the cache left packed at the step before.

    Raises:
        RuntimeError: If it has not: a model has changed the keys on their way, and lost what they were marked with.
    """
    if reading is not None and not reading.done:
        msg = (
            "the attention must read the keys that a packed cache gives, as they are: got a step whose past was not "
            "read. Dequantize the cache of this model (BITPLAN_KERNELS=reference)."
        )
        raise RuntimeError(msg)


def find_mark(key: Tensor) -> PackedPast | None:
    """Returns what keys were marked with."""
    return getattr(key, _MARK, None)


def attend_packed(query: Tensor, past: PackedPast, mask: Tensor | None, scaling: float) -> Tensor:
    """Returns the attention of one token, [batch, heads, 1, head_dim].

    Args:
        query: [batch, heads, 1, head_dim].
        past: What it attends over.
        mask: [batch, 1, 1, tokens] bool, True where it sees a token; None for all of them.
        scaling: Factor of the scores.
    """
    from runtime.kernels.triton.decode_attention import decode_attention

    past.reading.done = True
    seen = None if mask is None else mask.expand(query.shape[0], -1, -1, -1)[:, 0, 0]
    return decode_attention(query, past.keys, past.values, past.packed_count, past.tail, seen, scaling)
