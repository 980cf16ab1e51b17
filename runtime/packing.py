"""Dense bit packing of integer codes, row by row, exact for every width from 1 to 8.

Eight codes of ``bits`` bits are exactly ``bits`` bytes, so a row is handled eight codes at a time through
one 64-bit word: word = sum_j code_j << (bits * j), written as its lowest ``bits`` bytes in little-endian
order. A row whose length is no multiple of eight is padded with zero codes and cut to ceil(n * bits / 8)
bytes. Time and memory are linear in the number of codes; rows are handled in blocks to bound the 64-bit
temporaries.
"""

import torch
from torch import Tensor

from runtime.storage import packed_row_bytes

CODES_PER_WORD = 8
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


def _row_blocks(rows: int, count: int) -> list[tuple[int, int]]:
    step = max(1, _BLOCK_CODES // max(count, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _pack_block(codes: Tensor, bits: int) -> Tensor:
    rows, count = codes.shape
    padding = -count % CODES_PER_WORD
    padded = torch.nn.functional.pad(codes, (0, padding)).view(rows, -1, CODES_PER_WORD)
    words = torch.zeros(padded.shape[:2], dtype=torch.int64, device=codes.device)
    for j in range(CODES_PER_WORD):
        words |= padded[..., j].to(torch.int64) << (bits * j)
    octets = torch.empty((*words.shape, bits), dtype=torch.uint8, device=codes.device)
    for k in range(bits):
        octets[..., k] = (words >> (8 * k)).to(torch.uint8)
    return octets.view(rows, -1)[:, : packed_row_bytes(count, bits)]


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
