"""Formats of a cache, and the bytes of a cache in one.

A cache of T tokens holds, for each sequence, T rows of [heads, head_dim] numbers. Two ways to group them:

    per token      any format of weights whose groups fit a head: every head of every token is a row of its own,
                   quantized when the token becomes past.  T * storage_bytes((heads, head_dim))
    token blocks   ``int4_t32``: every channel of a block of G = 32 tokens is a row with one scale and zero point, as
                   the keys' channels differ more than their tokens. The last tokens, up to G - 1 of them, wait in
                   float16 until their block is complete.
                   floor(T / G) * storage_bytes((heads * head_dim, G)) + (T mod G) * heads * head_dim * 2

The bytes of a budget are the most that a cache takes on its way to T tokens: just before a block is complete, blocks
take more than with it.

Paper: Liu et al. 2024, KIVI, arXiv:2402.02750, section 3 (keys per channel, values per token, a residual of recent
tokens); there keys alone are in blocks, here the measured losses decide.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from runtime.formats import FORMATS, INTEGER_BITS, Format, find_format

RESIDUAL_BYTES = 2  # float16
TOKEN_BLOCKS = (32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class TokenBlockFormat(Format):
    """A format of caches whose rows are channels of a block of tokens; never one of weights.

    Args:
        token_block: Tokens of a block, G.
    """

    token_block: int

    @property
    def row_format(self) -> Format:
        """The format of a row, one channel of a block."""
        return find_format(f"int{self.bits}_channel")


@dataclass(frozen=True, kw_only=True)
class CacheLoad:
    """How full the caches are.

    Args:
        context: Tokens that each sequence keeps.
        batch: Sequences.
    """

    context: int
    batch: int

    @property
    def token_count(self) -> int:
        """Tokens of all sequences."""
        return self.context * self.batch


CACHE_FORMATS: dict[str, Format] = {
    **FORMATS,
    **{
        f"int{bits}_t{block}": TokenBlockFormat(
            name=f"int{bits}_t{block}", kind="int", bits=bits, symmetric=False, token_block=block
        )
        for bits in INTEGER_BITS
        for block in TOKEN_BLOCKS
    },
}


def find_cache_formats(names: Iterable[str]) -> tuple[Format, ...]:
    """Returns the cache formats of ``names``, in order.

    Raises:
        ValueError: If a name is unknown (the message names those that are spelled alike) or named twice, or there is
            no name at all.
    """
    named = list(names)
    unknown = [name for name in named if name not in CACHE_FORMATS]
    if unknown:
        alike = difflib.get_close_matches(unknown[0], CACHE_FORMATS, n=3, cutoff=0.0)
        msg = (
            f"a cache format must be a known name: got '{unknown[0]}'. Spelled alike: {', '.join(alike)}. Formats of "
            "weights are formats of caches, and int4_t32 and its like are along blocks of tokens."
        )
        raise ValueError(msg)
    if not named or len(set(named)) != len(named):
        msg = f"cache formats must name at least one format, each once: got {named}. Remove the repeats."
        raise ValueError(msg)
    return tuple(CACHE_FORMATS[name] for name in named)


def cache_bytes(format_: Format, shape: tuple[int, int], tokens: int) -> int:
    """Returns the exact bytes that one sequence's cache takes with so many tokens.

    Args:
        format_: The format.
        shape: (heads, head_dim) of one token.
        tokens: Tokens held.
    """
    if not isinstance(format_, TokenBlockFormat):
        return tokens * format_.storage_bytes(shape)
    blocks, recent = divmod(tokens, format_.token_block)
    numbers = shape[0] * shape[1]
    block_bytes = format_.row_format.storage_bytes((numbers, format_.token_block))
    return blocks * block_bytes + recent * numbers * RESIDUAL_BYTES


def most_cache_bytes(format_: Format, shape: tuple[int, int], load: CacheLoad) -> int:
    """Returns the most bytes that the caches of all sequences take up to a context.

    Args:
        format_: The format.
        shape: (heads, head_dim) of one token.
        load: Context and batch.
    """
    lengths = [load.context]
    if isinstance(format_, TokenBlockFormat):
        # The longest that is one token short of a complete block.
        lengths.append((load.context + 1) // format_.token_block * format_.token_block - 1)
    return load.batch * max(cache_bytes(format_, shape, tokens) for tokens in lengths if tokens > 0)
