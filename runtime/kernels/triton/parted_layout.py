"""Weights whose codes are sums of parts, as the Triton kernels read them.

    W = scale (factor_1 (q_1 - zero_1) + factor_2 (q_2 - zero_2) + ...)                one scale a group, or
    W = scale_1 factor_1 (q_1 - zero_1) + scale_2 factor_2 (q_2 - zero_2) + ...        one for each part of it.

The first is a nested weight, its narrowest width part 1 and what each higher width adds another; the second a sum of
binary planes. The parts of one row of tiles after another would cost the narrow reading its bytes, so the parts lie one
after the other: each is the ``words`` of an integer weight (``fragment_layout``), and the first of them are a weight by
themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.kernels.triton.fragment_layout import SCALE_NAMES, TILE_CODES, fits_groups, pack_words, pad_groups


@dataclass(frozen=True, kw_only=True)
class CodePart:
    """What the codes of a part stand for: factor * (code - zero).

    Args:
        bits: Code width.
        zero: The zero point, a multiple of 1/2.
        factor: What the part is multiplied by.
    """

    bits: int
    zero: float
    factor: float


@dataclass(frozen=True, kw_only=True)
class PartedWeight:
    """A weight [out_features, in_features] that is a sum of parts.

    Args:
        shape: (out_features, in_features).
        parts: The parts, at most 8 bits in all.
        group_size: Weights of one row that share scales: 16, 32, 64, a multiple of 128, or None for the whole row.
        words: [tiles * bits of all parts, ceil(out_features / 8), 4, 4] int32, the words of one part after the other.
        scale: [groups, rows padded to a multiple of 8] in a type of ``SCALE_NAMES``, no E4M3; groups of zeros follow
            where the row was padded. With scales for each part [groups * parts, ...], those of a group one after the
            other.
        each_scaled: Each part has scales of its own.
    """

    shape: tuple[int, int]
    parts: tuple[CodePart, ...]
    group_size: int | None
    words: Tensor
    scale: Tensor
    each_scaled: bool

    @property
    def bits(self) -> int:
        """Bits of a weight, all parts together."""
        return sum(part.bits for part in self.parts)

    @property
    def scale_name(self) -> str:
        """The type of the scales, as the kernels name it."""
        return SCALE_NAMES[self.scale.dtype]

    @property
    def read_bytes(self) -> int:
        """The bytes that one pass over the weight reads."""
        return self.words.nbytes + self.scale.nbytes


def pack_parts(
    codes: Sequence[Tensor],
    scale: Tensor,
    parts: Sequence[CodePart],
    *,
    group_size: int | None,
) -> PartedWeight:
    """Returns a sum of parts in the layout of the Triton kernels.

    Args:
        codes: [out_features, in_features] uint8 of each part.
        scale: [out_features, groups], or [out_features, groups, parts] for parts with scales of their own; float16,
            or powers of two in 8 bits, of which float32's least would be read as zero.
        parts: What these codes stand for.
        group_size: Weights of one row that share scales, one of ``fits_groups``; None for the whole row.
    """
    out_features, in_features = codes[0].shape
    assert fits_groups(group_size) and len(codes) == len(parts)
    return PartedWeight(
        shape=(out_features, in_features),
        parts=tuple(parts),
        group_size=group_size,
        words=torch.cat([pack_words(some, part.bits).flatten(0, 1) for some, part in zip(codes, parts, strict=True)]),
        scale=arrange_scales(scale, in_features, group_size),
        each_scaled=scale.ndim == 3,
    )


def arrange_scales(scale: Tensor, in_features: int, group_size: int | None) -> Tensor:
    """Returns scales [out_features, groups] or [out_features, groups, parts] as ``PartedWeight.scale``."""
    if scale.ndim == 2:
        return pad_groups(scale, in_features, group_size)
    # 8-bit floats cannot be stacked: as bytes they can.
    plain = scale.view(torch.uint8) if scale.element_size() == 1 else scale
    of_parts = [pad_groups(some, in_features, group_size) for some in plain.unbind(2)]
    return torch.stack(of_parts, dim=1).flatten(0, 1).view(scale.dtype)


def count_tiles(in_features: int) -> int:
    """Returns the tiles of a row."""
    return -(-in_features // TILE_CODES)
