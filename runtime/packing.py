"""Dense bit packing of integer codes, row by row, exact for every width from 1 to 8.

Eight codes of ``bits`` bits are exactly ``bits`` bytes, so a row is handled eight codes at a time through
one 64-bit word: word = sum_j code_j << (bits * j), written as its lowest ``bits`` bytes in little-endian
order. A row whose length is no multiple of eight is padded with zero codes and cut to ceil(n * bits / 8)
bytes. Eight bytes that hold a code each are such a word with gaps: packing closes these in three steps, between
neighbouring codes, pairs and fours. Time and memory are linear in the number of codes; rows are handled in blocks to
bound the 64-bit temporaries. Machines are little-endian, as those that torch is built for.

Digits of three values go five to a byte, 1.6 bits each: byte = t_0 + 3 t_1 + 9 t_2 + 27 t_3 + 81 t_4, at most 242.
"""

import torch
from torch import Tensor

from runtime.stored_tensor import packed_row_bytes, trit_row_bytes

CODES_PER_WORD = 8
_TRIT_POWERS = (1, 3, 9, 27, 81)
_BLOCK_CODES = 1 << 22


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Returns the codes as packed bytes.

    Args:
        codes: [rows, count] uint8, each below 2**bits.
        bits: Code width, 1 to 8.

    Returns:
        [rows, ceil(count * bits / 8)] uint8.
    """
    if bits == 8:
        return codes.contiguous()
    rows, count = codes.shape
    out = torch.empty((rows, packed_row_bytes(count, bits)), dtype=torch.uint8, device=codes.device)
    for start, stop in _row_blocks(rows, count):
        out[start:stop] = _pack_block(codes[start:stop], bits)
    return out


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Returns the codes that ``pack_codes`` packed.

    Args:
        packed: [rows, ceil(count * bits / 8)] uint8.
        bits: Code width, 1 to 8.
        count: Codes per row.

    Returns:
        [rows, count] uint8.
    """
    if bits == 8:
        return packed
    rows = packed.shape[0]
    out = torch.empty((rows, count), dtype=torch.uint8, device=packed.device)
    for start, stop in _row_blocks(rows, count):
        out[start:stop] = _unpack_block(packed[start:stop], bits, count)
    return out


def pack_trits(trits: Tensor) -> Tensor:
    """Returns the digits [rows, count] uint8, each 0, 1 or 2, as bytes [rows, ceil(count / 5)] uint8."""
    rows, count = trits.shape
    padded = torch.nn.functional.pad(trits, (0, -count % 5)).view(rows, trit_row_bytes(count), 5)
    return (padded * torch.tensor(_TRIT_POWERS, dtype=torch.uint8, device=trits.device)).sum(-1, dtype=torch.uint8)


def unpack_trits(packed: Tensor, count: int) -> Tensor:
    """Returns the digits [rows, count] uint8 that ``pack_trits`` packed."""
    digits = [(packed // power) % 3 for power in _TRIT_POWERS]
    return torch.stack(digits, dim=-1).flatten(1)[:, :count]


def _row_blocks(rows: int, count: int) -> list[tuple[int, int]]:
    step = max(1, _BLOCK_CODES // max(count, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _pack_block(codes: Tensor, bits: int) -> Tensor:
    rows, count = codes.shape
    octets = torch.zeros((rows, -(-count // CODES_PER_WORD) * CODES_PER_WORD), dtype=torch.uint8, device=codes.device)
    octets[:, :count] = codes
    words = octets.view(torch.int64)
    for width in (8, 16, 32):
        # Of two neighbouring fields the upper comes down to the bits that the lower one has filled.
        filled = width * bits // 8
        lower = sum(((1 << filled) - 1) << start for start in range(0, 64, 2 * width))
        upper = words >> (width - filled)
        words.bitwise_and_(lower).bitwise_or_(upper.bitwise_and_(lower << filled))
    return octets.view(rows, -1, CODES_PER_WORD)[..., :bits].reshape(rows, -1)[:, : packed_row_bytes(count, bits)]


def _unpack_block(packed: Tensor, bits: int, count: int) -> Tensor:
    rows, row_bytes = packed.shape
    words_per_row = (count + CODES_PER_WORD - 1) // CODES_PER_WORD
    octets = torch.nn.functional.pad(packed, (0, words_per_row * bits - row_bytes)).view(rows, words_per_row, bits)
    words = torch.zeros((rows, words_per_row), dtype=torch.int64, device=packed.device)
    for k in range(bits):
        words |= octets[..., k].to(torch.int64) << (8 * k)
    codes = torch.empty((rows, words_per_row, CODES_PER_WORD), dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for j in range(CODES_PER_WORD):
        codes[..., j] = (words >> (bits * j)).bitwise_and_(mask).to(torch.uint8)
    return codes.view(rows, -1)[:, :count]
