"""Groups of 2 and of 4 bits in one weight, as the Triton kernels read them: all of 2 bits, and what is left of some.

A code of 4 bits is two of 2, q = 4 high + low, and so is its zero point:

    scale (q - zero) = 4 scale (high - zero_high) + scale (low - zero_low)

So the high parts stand with the codes of narrow groups in a weight of 2 bits (``fragment_layout``), whose scales of
wide groups are 4 scale; the low parts stand by themselves, those of a block of 16 rows in the order of its wide groups.
A bit says of each group whether its block has a low part, and a count where those of every 32 groups begin. Outliers
have codes that are their zero points, which count for nothing, and stand apart with their columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.kernels.triton.fragment_layout import TILE_CODES, TILE_ROWS, pack_fragments, pack_words, pack_zeros

HIGH_BITS = 2
# Codes of 2 bits that fill one word of a thread: half a tile.
WORD_CODES = 32
_FLAGS = 32


@dataclass(frozen=True, kw_only=True)
class MixedGroups:
    """A weight [out_features, in_features] of groups of 2 and of 4 bits, and outliers.

    Args:
        shape: (out_features, in_features).
        group_size: Weights of one row that share a scale: 32 or 64.
        words, scale, zero_point: The weight of 2 bits, as in ``FragmentWeight``; scales of wide groups are 4 scale.
        low_words: [half tiles of a row's wide groups, ceil(out_features / 8), 4, 4] int32, the low parts.
        low_zero: [wide groups of a row, words of the padded rows] int32, their zero points, as in ``FragmentWeight``.
        flags: [ceil(groups / 32), ceil(out_features / 16)] int32, a bit for each group of a block of rows.
        starts: The same shape in int32, how many wide groups come before.
        outlier: [count, out_features] float16.
        outlier_column: [count, out_features] int16, of which 16 bits are the column.
    """

    shape: tuple[int, int]
    group_size: int
    words: Tensor
    scale: Tensor
    zero_point: Tensor
    low_words: Tensor
    low_zero: Tensor
    flags: Tensor
    starts: Tensor
    outlier: Tensor
    outlier_column: Tensor

    @property
    def read_bytes(self) -> int:
        """The bytes that one pass over the weight reads."""
        return sum(field.nbytes for field in vars(self).values() if isinstance(field, Tensor))


def pack_mixed_groups(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    wide: Tensor,
    outlier: Tensor,
    outlier_column: Tensor,
) -> MixedGroups:
    """Returns a weight of groups of 2 and of 4 bits in the layout of the Triton kernels.

    Args:
        codes: [out_features, groups, group size] uint8, below 16 in wide groups and below 4 in others.
        scale: [out_features, groups] float16; four times that of a wide group must be one too.
        zero_point: [out_features, groups] uint8, of as many bits as the codes.
        wide: [ceil(out_features / 16), groups] bool, as many in each row.
        outlier: [out_features, count] float16, in narrow groups.
        outlier_column: [out_features, count] int64, below 2**16.
    """
    rows, groups, length = codes.shape
    of_rows = wide.repeat_interleave(2 * TILE_ROWS, dim=0)[:rows]
    high = torch.where(of_rows.unsqueeze(-1), codes >> HIGH_BITS, codes)
    zero_high = torch.where(of_rows, zero_point >> HIGH_BITS, zero_point)
    nothing = zero_high.gather(1, outlier_column // length)
    high = high.flatten(1).scatter(1, outlier_column, nothing)
    factor = torch.where(of_rows, 1 << HIGH_BITS, 1)
    whole = pack_fragments(high, (scale * factor).to(torch.float16), zero_high, bits=HIGH_BITS, group_size=length)
    low = (codes[of_rows] & 3).view(rows, -1)
    zero_low = torch.nn.functional.pad((zero_point[of_rows] & 3).view(rows, -1), (0, 0, 0, -rows % TILE_ROWS))
    assert whole.zero_point is not None
    flags, starts = _index_groups(wide, groups + -groups % (TILE_CODES // length))
    return MixedGroups(
        shape=(rows, groups * length),
        group_size=length,
        words=whole.words,
        scale=whole.scale,
        zero_point=whole.zero_point,
        low_words=pack_words(low, HIGH_BITS).flatten(0, 1)[: low.shape[1] // WORD_CODES].contiguous(),
        low_zero=pack_zeros(zero_low.t(), HIGH_BITS),
        flags=flags,
        starts=starts,
        outlier=outlier.t().contiguous(),
        outlier_column=outlier_column.t().to(torch.int16).contiguous(),
    )


def _index_groups(wide: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Returns ``flags`` and ``starts`` of the groups of a padded row."""
    padded = torch.nn.functional.pad(wide, (0, groups + -groups % _FLAGS - wide.shape[1])).to(torch.int64)
    split = padded.view(len(wide), -1, _FLAGS)
    flags = (split << torch.arange(_FLAGS, device=wide.device)).sum(-1)
    counts = split.sum(-1)
    # The highest bit is the sign of 32.
    signed = torch.where(flags >= 2**31, flags - 2**32, flags).to(torch.int32)
    return signed.t().contiguous(), (counts.cumsum(1) - counts).to(torch.int32).t().contiguous()
