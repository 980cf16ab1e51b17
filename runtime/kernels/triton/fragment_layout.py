"""Codes in the order in which a tensor core takes them: the layout of the Triton kernels.

In an mma.m16n8k16 a thread holds, of a row of the weight, the codes k = 16 t + 8 h + 2 q + l for its own q in 0..3
and l in {0, 1} as the two 16-bit halves of one register. So the codes of one thread are kept together. Tiles are 64
codes of 8 neighbouring rows; in a tile a thread (q) has 8 rows x 16 codes = 4 vectors (v) of 16 pairs each, where

    row = 8 r + 2 v + j,    k = 64 tile + 16 t + 8 h + 2 q + l,    pair = 4 t + 2 h + j    (two rows, v fixed).

The 16 pairs of width b fill exactly b 32-bit words, l = 0 in the low half and l = 1 in the high half of each. With
S = 16 // b whole codes a half, pair p < b S lies in word p // S at bit b (p mod S) of both halves; what is left of the
halves (16 - b S bits each) holds the bits of the remaining pairs in order. This is dense for every b from 1 to 8 and
needs one shift and one mask a pair, except the few pairs in the left-over bits; separate bit planes (3 = 2 + 1) would
need two of each for every pair.

``words`` [tiles, b, r, q, v] int32: the four words v that a thread reads at once are 16 neighbouring bytes, and a warp
reads 512. Rows are padded to a multiple of 8, the length of a row to one of 64, both with code 0.

Zero points of b bits take 1, 2, 4 or 8 (``find_zero_bits``), row after row from the low bits of a word: as bytes, those
of two bits would be 4 % of all that is read in groups of 64. Scales keep the type they are stored in: float16, or one
byte each (powers of two, E4M3), which in groups of 16 codes of 4 bits saves a tenth of all that is read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TILE_CODES = 64
TILE_ROWS = 8
PAIRS = 16
_HALF_BITS = 16
_WORD_BITS = 32
# How scales are stored, as formats and the kernels name it, and the types in which these read them; ``TWO_VALUES`` are
# float16 numbers without a scale.
TWO_VALUES = "ends"
SCALE_DTYPES = {"fp16": torch.float16, "e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}
SCALE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class FragmentWeight:
    """A weight [out_features, in_features] as the Triton kernels read it: factor * scale * (code - zero point).

    Args:
        shape: (out_features, in_features).
        bits: Code width, 1 to 8.
        group_size: Weights of one row that share a scale: 16, 32, 64, a multiple of 128, or None for the whole row.
        words: [tiles, bits, ceil(out_features / 8), 4, 4] int32, the codes.
        scale: [groups, rows padded to a multiple of 8] in a type of ``SCALE_NAMES``; groups of zeros follow where the
            row was padded.
        zero_point: [groups, words of the padded rows] int32, or None when zero is at the code 2**(bits - 1), or at
            1/2 for one bit. One bit may have two free values instead: float16 as the scale, the value of the code 0,
            and the scale is that of the code 1.
        element: Mantissa bits of codes that are floats, sign and exponent before them, whose bias is 15: what another
            bias makes of them is in the factor. -1 for integers.
        factor: What all weights are multiplied by.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int | None
    words: Tensor
    scale: Tensor
    zero_point: Tensor | None
    element: int = -1
    factor: float = 1.0

    @property
    def scale_name(self) -> str:
        """The type of the scales, as the kernels name it."""
        two_values = self.zero_point is not None and self.zero_point.dtype == torch.float16
        return TWO_VALUES if two_values else SCALE_NAMES[self.scale.dtype]

    @property
    def kernel_factor(self) -> float:
        """What the kernels multiply by: they read E4M3 as the float16 of the same bits, 2**-8 of it."""
        return self.factor * (2.0**8 if self.scale.dtype == torch.float8_e4m3fn else 1.0)

    @property
    def read_bytes(self) -> int:
        """The bytes that one pass over the weight reads."""
        tensors = (self.words, self.scale) if self.zero_point is None else (self.words, self.scale, self.zero_point)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def pack_fragments(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    *,
    bits: int,
    group_size: int | None,
    element: int = -1,
    factor: float = 1.0,
) -> FragmentWeight:
    """Returns a weight in the layout of the Triton kernels.

    Args:
        codes: [out_features, in_features] uint8, each below 2**bits.
        scale: [out_features, groups] in a type of ``SCALE_NAMES``, not negative where that has 8 bits, and of these no
            power of two that is float32's least and would be read as zero.
        zero_point: [out_features, groups] uint8, or None for 2**(bits - 1), or 1/2 for one bit; or float16, the values
            of the code 0 of one bit, whose code 1 has those of ``scale``.
        bits: Code width, 1 to 8.
        group_size: Weights of one row that share a scale; None for the whole row.
        element, factor: As in ``FragmentWeight``.

    Raises:
        ValueError: If the width, or the group size, is none that the kernels take.
    """
    out_features, in_features = codes.shape
    if not 1 <= bits <= 8:
        msg = f"bits must be from 1 to 8: got bits={bits}. Store the weight in an integer format."
        raise ValueError(msg)
    if group_size is not None and (not fits_groups(group_size) or in_features % group_size):
        msg = (
            f"group_size must be 16, 32, 64, a multiple of 128 or None, and divide in_features: got "
            f"group_size={group_size}, in_features={in_features}. Use another format, or the reference path."
        )
        raise ValueError(msg)
    if zero_point is not None:
        zero_point = pad_groups(zero_point, in_features, group_size)
        zero_point = pack_zeros(zero_point, bits) if zero_point.dtype == torch.uint8 else zero_point
    return FragmentWeight(
        shape=(out_features, in_features),
        bits=bits,
        group_size=group_size,
        words=pack_words(codes, bits),
        scale=pad_groups(scale, in_features, group_size),
        zero_point=zero_point,
        element=element,
        factor=factor,
    )


def fits_groups(group_size: int | None) -> bool:
    """Returns True for the group sizes that the kernels multiply."""
    return group_size is None or group_size in (16, 32, 64) or group_size % 128 == 0


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Returns codes [out_features, in_features] uint8 as ``words`` [tiles, bits, rows / 8, 4, 4] int32."""
    pairs = _to_pairs(codes)
    halves = torch.zeros((bits, *pairs.shape[1:]), dtype=torch.int32, device=codes.device)
    for pair in range(PAIRS):
        for word, bit, low, width in list_fields(pair, bits):
            halves[word] |= ((pairs[pair] >> low) & ((1 << width) - 1)) << bit
    # [bits, tiles, r, q, v, l] -> one word of both halves
    words = halves[..., 0] | (halves[..., 1] << _HALF_BITS)
    return words.transpose(0, 1).contiguous()


def unpack_words(words: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """Returns the codes [out_features, in_features] uint8 that ``pack_words`` packed."""
    tiles, _, row_blocks = words.shape[:3]
    halves = torch.stack([words & 0xFFFF, (words >> _HALF_BITS) & 0xFFFF], dim=-1).transpose(0, 1)
    pairs = torch.zeros((PAIRS, *halves.shape[1:]), dtype=torch.int32, device=words.device)
    for pair in range(PAIRS):
        for word, bit, low, width in list_fields(pair, bits):
            pairs[pair] |= ((halves[word] >> bit) & ((1 << width) - 1)) << low
    # [t, h, j, tile, r, q, v, l] -> [r, v, j, tile, t, h, q, l]
    codes = pairs.view(4, 2, 2, tiles, row_blocks, 4, 4, 2).permute(4, 6, 2, 3, 0, 1, 5, 7)
    codes = codes.reshape(row_blocks * TILE_ROWS, tiles * TILE_CODES)
    return codes[: shape[0], : shape[1]].to(torch.uint8)


def list_fields(pair: int, bits: int) -> list[tuple[int, int, int, int]]:
    """Returns where the code of a pair lies: (word, bit in the half, lowest bit of the code there, how many bits)."""
    slots = _HALF_BITS // bits
    if pair < bits * slots:
        return [(pair // slots, pair % slots * bits, 0, bits)]
    spare, first = _HALF_BITS - slots * bits, (pair - bits * slots) * bits
    fields: list[tuple[int, int, int, int]] = []
    low = 0
    while low < bits:
        word, offset = divmod(first + low, spare)
        width = min(spare - offset, bits - low)
        fields.append((word, slots * bits + offset, low, width))
        low += width
    return fields


def _to_pairs(codes: Tensor) -> Tensor:
    rows, count = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -count % TILE_CODES, 0, -rows % TILE_ROWS)).to(torch.int32)
    # [r, v, j, tile, t, h, q, l] -> [t, h, j, tile, r, q, v, l]
    split = padded.view(padded.shape[0] // TILE_ROWS, 4, 2, padded.shape[1] // TILE_CODES, 4, 2, 4, 2)
    return split.permute(4, 5, 2, 3, 0, 6, 1, 7).reshape(PAIRS, split.shape[3], split.shape[0], 4, 4, 2)


def find_zero_bits(bits: int) -> int:
    """Returns in how many bits a zero point of ``bits`` bits is kept: the next power of two, so that none is split."""
    return 1 << (bits - 1).bit_length()


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Returns zero points [groups, rows] as words [groups, ceil(rows / those of a word)] int32."""
    width = find_zero_bits(bits)
    each = _WORD_BITS // width
    padded = torch.nn.functional.pad(zeros, (0, -zeros.shape[1] % each)).to(torch.int32)
    words = torch.zeros_like(padded[:, ::each])
    for i in range(each):
        words |= padded[:, i::each] << (i * width)
    return words


def unpack_zeros(words: Tensor, bits: int, rows: int) -> Tensor:
    """Returns the zero points [groups, rows] uint8 that ``pack_zeros`` packed."""
    width = find_zero_bits(bits)
    fields = [(words >> low) & ((1 << width) - 1) for low in range(0, _WORD_BITS, width)]
    return torch.stack(fields, dim=-1).flatten(1)[:, :rows].to(torch.uint8)


def pad_groups(values: Tensor, in_features: int, group_size: int | None) -> Tensor:
    """Returns [rows, groups] as [groups of the padded row, rows padded to a multiple of 8], padded with zeros."""
    rows, groups = values.shape
    # 8-bit floats cannot be padded: as bytes they can.
    values, dtype = (values.view(torch.uint8) if values.element_size() == 1 else values), values.dtype
    more = 0 if group_size is None else -(-(in_features + -in_features % TILE_CODES) // group_size) - groups
    padded = torch.nn.functional.pad(values, (0, more, 0, -rows % TILE_ROWS))
    # Through one dimension: the strides of a single group must be those of a row, or it is no view of whole words.
    return padded.t().reshape(-1).view(dtype).view(groups + more, padded.shape[0])
