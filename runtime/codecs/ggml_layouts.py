"""The blocks of llama.cpp's formats: from their bytes to the integers and scales they hold, and back.

    value = (d * scale[k]) * level - dmin * min[k],       k the part of the block that the weight is in

A level is the code less a constant, or, in the formats whose names begin with iq, the code's entry in a table. d and
dmin are float16, one a block; the scales and minima of the parts are small integers. The formats without parts have
one, of scale (and minimum) 1; Q4_1 and Q5_1 store their minimum with the opposite sign. Codes lie in planes: in each
run of bytes the lowest bits hold the first weights, the next bits the following ones.

Source of the layouts: ``gguf.quants`` of the package gguf 0.19, ``ggml-common.h``.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from runtime.ggml_blocks import GGML_BLOCKS


@dataclass(frozen=True, eq=False)
class Fields:
    """What blocks hold; leading axes are free.

    Args:
        codes: [..., parts, length] uint8.
        scales: [..., parts] int32, 1 where the format has no parts.
        mins: [..., parts] int32 from 0 on; None where the format has no minima.
        d: [...] float16.
        dmin: [...] float16, or None.
    """

    codes: Tensor
    scales: Tensor
    mins: Tensor | None
    d: Tensor
    dmin: Tensor | None


@dataclass(frozen=True)
class Plane:
    """Where bits of codes lie: a name of a part of the block, bits of each code in it, bytes of a run."""

    name: str
    width: int
    run: int


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """One block format.

    Args:
        sections: Names and bytes of the sections of a block, in order.
        planes: Planes of the codes, lowest bits first.
        parts: Parts of a block with scales of their own.
        zero: Code that stands for zero, where levels are codes less a constant.
        scales: How the integers of the parts are packed; None without parts.
        scale_range: Least and largest scale of a part.
        most_min: Largest minimum of a part; 0 without minima.
        table: Level of each code, rising; empty where levels are codes less a constant.
    """

    sections: tuple[tuple[str, int], ...]
    planes: tuple[Plane, ...]
    parts: int = 1
    zero: int = 0
    scales: Literal["nibbles", "six_bits", "six_bit_pairs", "six_bits_in_order", "int8"] | None = None
    scale_range: tuple[int, int] = (1, 1)
    most_min: int = 0
    table: tuple[int, ...] = ()

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << sum(plane.width for plane in self.planes)) - 1

    @property
    def ends(self) -> tuple[int, int]:
        """The least and the largest level."""
        return (self.table[0], self.table[-1]) if self.table else (-self.zero, self.top - self.zero)

    @cached_property
    def _nearest_by_half(self) -> Tensor:
        """The level nearest to the numbers between h/2 and (h + 1)/2, h from twice the least level on."""
        table = torch.tensor(self.table, dtype=torch.float32)
        middles = (torch.arange(2 * self.table[0], 2 * self.table[-1] + 1) + 0.5) / 2
        return table[torch.bucketize(middles, (table[1:] + table[:-1]) / 2)]

    @cached_property
    def _code_by_level(self) -> Tensor:
        """The code of each level that there is, counted from the least on."""
        numbers = torch.arange(self.table[0], self.table[-1] + 1)
        return torch.searchsorted(torch.tensor(self.table), numbers).to(torch.uint8)

    def levels(self, codes: Tensor) -> Tensor:
        """Returns the float32 levels of codes."""
        if self.table:
            table = torch.tensor(self.table, dtype=torch.float32)
            return torch.index_select(table, 0, codes.int().flatten()).view(codes.shape)
        return codes.to(torch.float32) - self.zero

    def codes(self, levels: Tensor) -> Tensor:
        """Returns the uint8 codes of levels."""
        if self.table:
            above = (levels - self.table[0]).to(torch.int32)
            return torch.index_select(self._code_by_level, 0, above.flatten()).view(levels.shape)
        return (levels + self.zero).to(torch.uint8)

    def nearest(self, x: Tensor, step: Tensor) -> Tensor:
        """Returns the level whose multiple of the step is nearest; that nearest to zero where the step is zero."""
        scaled = torch.where(step == 0, 0.0, x / step)
        if self.table:
            # Levels are integers: between two multiples of one half, one level is the nearest.
            halves = scaled.mul_(2).floor_().clamp_(*(2 * end for end in self.ends)).sub_(2 * self.table[0])
            return torch.index_select(self._nearest_by_half, 0, halves.to(torch.int32).flatten()).view(halves.shape)
        return scaled.round_().clamp_(*self.ends)

    def split(self, blocks: Tensor) -> dict[str, Tensor]:
        """Returns the sections of blocks [..., bytes]."""
        parts = torch.split(blocks, [size for _, size in self.sections], dim=-1)
        return {name: part for (name, _), part in zip(self.sections, parts, strict=True)}

    def unpack(self, blocks: Tensor) -> Fields:
        """Returns the fields of blocks [..., bytes]."""
        sections = self.split(blocks)
        codes = torch.zeros((), dtype=torch.uint8)
        shift = 0
        for plane in self.planes:
            codes = codes | (spread(sections[plane.name], plane.width, plane.run) << shift)
            shift += plane.width
        if shift == 8:
            codes = codes ^ 0x80
        scales, mins = self._unpack_scales(sections)
        d = _read_half(sections["d"])
        dmin = None if mins is None else _read_half(sections["dmin" if self.scales else "m"])
        if dmin is not None and self.scales is None:
            dmin = -dmin
        return Fields(codes.view(*codes.shape[:-1], self.parts, -1), scales, mins, d, dmin)

    def pack(self, fields: Fields) -> Tensor:
        """Returns the blocks [..., bytes] uint8 that hold these fields."""
        codes = fields.codes.flatten(-2)
        sections = {"d": _write_half(fields.d), **self._pack_scales(fields)}
        if fields.dmin is not None:
            sections["dmin" if self.scales else "m"] = _write_half(fields.dmin if self.scales else -fields.dmin)
        if sum(plane.width for plane in self.planes) == 8:
            codes = codes ^ 0x80
        for plane in self.planes:
            sections[plane.name] = gather(codes & ((1 << plane.width) - 1), plane.width, plane.run)
            codes = codes >> plane.width
        return torch.cat([sections[name] for name, _ in self.sections], dim=-1)

    def _unpack_scales(self, sections: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        if self.scales is None:
            ones = torch.ones((*sections["d"].shape[:-1], 1), dtype=torch.int32)
            return ones, ones if "m" in sections else None
        packed = sections["scales"]
        if self.scales == "nibbles":
            return (packed & 15).int(), (packed >> 4).int()
        if self.scales == "int8":
            return packed.view(torch.int8).int(), None
        if self.scales == "six_bits_in_order":
            low, high = spread(packed, 4, 1), spread(sections["scale_tops"], 2, 1)
            return (low | (high << 4)).int() - 32, None
        if self.scales == "six_bits":
            low, high = spread(packed[..., :8], 4, 8), spread(packed[..., 8:], 2, 4)
            return (low | (high << 4)).int() - 32, None
        # The upper four scales and minima share nibbles; their highest bits lie above the lower four.
        scale, least, both = torch.split(packed, 4, dim=-1)
        scales = torch.cat([scale & 63, (both & 15) | ((scale >> 2) & 48)], dim=-1)
        return scales.int(), torch.cat([least & 63, (both >> 4) | ((least >> 2) & 48)], dim=-1).int()

    def _pack_scales(self, fields: Fields) -> dict[str, Tensor]:
        if self.scales is None:
            return {}
        scales = fields.scales
        if self.scales == "int8":
            return {"scales": scales.to(torch.int8).view(torch.uint8)}
        if self.scales in ("six_bits", "six_bits_in_order"):
            six = (scales + 32).to(torch.uint8)
            if self.scales == "six_bits_in_order":
                return {"scales": gather(six & 15, 4, 1), "scale_tops": gather(six >> 4, 2, 1)}
            return {"scales": torch.cat([gather(six & 15, 4, 8), gather(six >> 4, 2, 4)], dim=-1)}
        assert fields.mins is not None
        unsigned, mins = scales.to(torch.uint8), fields.mins.to(torch.uint8)
        if self.scales == "nibbles":
            return {"scales": unsigned | (mins << 4)}
        (low, high), (low_min, high_min) = torch.split(unsigned, 4, dim=-1), torch.split(mins, 4, dim=-1)
        parts = [low | ((high >> 4) << 6), low_min | ((high_min >> 4) << 6), (high & 15) | ((high_min & 15) << 4)]
        return {"scales": torch.cat(parts, dim=-1)}


def spread(packed: Tensor, width: int, run: int) -> Tensor:
    """Returns the numbers of ``width`` bits in bytes [..., count]: run by run, the lowest bits of its bytes first."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8).view(-1, 1)
    numbers: Tensor = (packed.reshape(*packed.shape[:-1], -1, 1, run) >> shifts) & ((1 << width) - 1)
    return numbers.flatten(-3)


def gather(numbers: Tensor, width: int, run: int) -> Tensor:
    """Returns the bytes that ``spread`` reads these numbers from."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8).view(-1, 1)
    shifted: Tensor = numbers.reshape(*numbers.shape[:-1], -1, 8 // width, run) << shifts
    return shifted.sum(-2, dtype=torch.uint8).flatten(-2)


def _read_half(section: Tensor) -> Tensor:
    return section.contiguous().view(torch.float16).squeeze(-1)


def _write_half(numbers: Tensor) -> Tensor:
    return numbers.to(torch.float16).unsqueeze(-1).contiguous().view(torch.uint8)


# Levels of the 4-bit formats with a table, dense around zero as weights are.
_LEVELS_OF_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

GGML_LAYOUTS: dict[str, BlockLayout] = {
    "q4_0": BlockLayout(sections=(("d", 2), ("low", 16)), planes=(Plane("low", 4, 16),), zero=8),
    "q4_1": BlockLayout(sections=(("d", 2), ("m", 2), ("low", 16)), planes=(Plane("low", 4, 16),), most_min=1),
    "q5_0": BlockLayout(
        sections=(("d", 2), ("high", 4), ("low", 16)), planes=(Plane("low", 4, 16), Plane("high", 1, 1)), zero=16
    ),
    "q5_1": BlockLayout(
        sections=(("d", 2), ("m", 2), ("high", 4), ("low", 16)),
        planes=(Plane("low", 4, 16), Plane("high", 1, 1)),
        most_min=1,
    ),
    "q8_0": BlockLayout(sections=(("d", 2), ("low", 32)), planes=(Plane("low", 8, 32),), zero=128),
    "iq4_nl": BlockLayout(sections=(("d", 2), ("low", 16)), planes=(Plane("low", 4, 16),), table=_LEVELS_OF_IQ4),
    "q2_k": BlockLayout(
        sections=(("scales", 16), ("low", 64), ("d", 2), ("dmin", 2)),
        planes=(Plane("low", 2, 32),),
        parts=16,
        scales="nibbles",
        scale_range=(0, 15),
        most_min=15,
    ),
    "q3_k": BlockLayout(
        sections=(("high", 32), ("low", 64), ("scales", 12), ("d", 2)),
        planes=(Plane("low", 2, 32), Plane("high", 1, 32)),
        parts=16,
        zero=4,
        scales="six_bits",
        scale_range=(-32, 31),
    ),
    "q4_k": BlockLayout(
        sections=(("d", 2), ("dmin", 2), ("scales", 12), ("low", 128)),
        planes=(Plane("low", 4, 32),),
        parts=8,
        scales="six_bit_pairs",
        scale_range=(0, 63),
        most_min=63,
    ),
    "q5_k": BlockLayout(
        sections=(("d", 2), ("dmin", 2), ("scales", 12), ("high", 32), ("low", 128)),
        planes=(Plane("low", 4, 32), Plane("high", 1, 32)),
        parts=8,
        scales="six_bit_pairs",
        scale_range=(0, 63),
        most_min=63,
    ),
    "q6_k": BlockLayout(
        sections=(("low", 128), ("high", 64), ("scales", 16), ("d", 2)),
        planes=(Plane("low", 4, 64), Plane("high", 2, 32)),
        parts=16,
        zero=32,
        scales="int8",
        scale_range=(-128, 127),
    ),
    "iq4_xs": BlockLayout(
        sections=(("d", 2), ("scale_tops", 2), ("scales", 4), ("low", 128)),
        planes=(Plane("low", 4, 16),),
        parts=8,
        scales="six_bits_in_order",
        scale_range=(-32, 31),
        table=_LEVELS_OF_IQ4,
    ),
}
assert all(sum(size for _, size in layout.sections) == GGML_BLOCKS[name][1] for name, layout in GGML_LAYOUTS.items())
