"""Floats whose split into exponent and mantissa bits is searched for each row, and whose bias is a real number.

    value = +-scale[i, g] * |element of E exponent and M mantissa bits| / (largest of them),      E + M = bits - 1

A real bias b of such a float is a factor 2^-b, so it is stored as what it makes the largest magnitude: the scale, a
float16 for each group, is the maximum of the paper's b = 2^E - log2(max) + log2(2 - 2^-M) - 1. Every split is tried
with every clipping factor of the group, the weighted squared error of a row decides between splits, that of a group
between factors. All codes are finite numbers. The split takes one byte a row.

Paper: Liu et al. 2023 (LLM-FP4, arXiv:2310.16836, section 4.1); there the layer's output error decides, over one
hundred biases for a whole channel.
"""

from functools import cache

import torch
from torch import Tensor

from runtime.codecs.codebook import Codebook, Scaled, choose_scales
from runtime.codecs.codec import Codec, ColumnGrid, StoredTensors, check_range, pick
from runtime.elements import make_float
from runtime.packing import pack_codes, unpack_codes
from runtime.quantizers.grid import LARGEST_SCALE, SMALLEST_SCALE
from runtime.storage import Format

_BLOCK_ROWS = 4096
# One exponent bit is an integer grid; beyond five, steps of powers of two are all that is left of the mantissa.
MOST_EXPONENT_BITS = 5
_FEW_CODES = tuple(1.0 - 0.05 * step for step in range(11))
_MANY_CODES = (1.0, 0.875, 0.75)


def list_splits(bits: int) -> range:
    """Returns the exponent bits that a float of ``bits`` bits may have."""
    return range(1, min(bits - 1, MOST_EXPONENT_BITS) + 1)


@cache
def unit_codebook(bits: int, exponent_bits: int) -> Codebook:
    """Returns the codebook of a float of ``bits`` bits, divided by its largest value."""
    element = make_float(exponent_bits, bits - 1 - exponent_bits, 0)
    return Codebook.of([value / element.largest for value in element.values])


def encode_searched_float(weight: Tensor, format_: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Returns codes, scales and splits of the least error.

    Raises:
        ValueError: If the group size does not divide the row, or a weight is not finite or beyond float16.
    """
    check_range(weight, format_, LARGEST_SCALE)
    groups = format_.group_count(weight.shape[1])
    parts: dict[str, list[Tensor]] = {"codes": [], "scale": [], "exponent": []}
    for start in range(0, len(weight), _BLOCK_ROWS):
        grouped = weight[start : start + _BLOCK_ROWS].reshape(-1, groups, weight.shape[1] // groups)
        found, exponent = _search_block(grouped, importance, format_.bits)
        parts["codes"].append(pack_codes(found.codes.flatten(1), format_.bits))
        parts["scale"].append(found.stored)
        parts["exponent"].append(exponent)
    return {name: torch.cat(blocks) for name, blocks in parts.items()}


def decode_searched_float(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the value of each code in its row's split, times its scale."""
    scale, exponent = pick(tensors["scale"], rows).to(torch.float32), pick(tensors["exponent"], rows)
    codes = searched_float_codes(tensors, format_, shape, rows)
    values = torch.empty(codes.shape, device=codes.device)
    for split in list_splits(format_.bits):
        chosen = exponent == split
        values[chosen] = unit_codebook(format_.bits, split).values_of(codes[chosen])
    return values.view(*scale.shape, -1).mul_(scale.unsqueeze(-1)).view(codes.shape)


def searched_float_codes(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the codes as uint8."""
    return unpack_codes(pick(tensors["codes"], rows), format_.bits, shape[1])


def searched_float_grid(tensors: StoredTensors, format_: Format, shape: tuple[int, int]) -> ColumnGrid:
    """Returns the values of each row's split times the scales of each column's groups."""
    scales = tensors["scale"].T.to(torch.float32).contiguous()
    length = shape[1] // len(scales)
    splits = {split: tensors["exponent"] == split for split in list_splits(format_.bits)}
    rows_of = {split: rows.nonzero().view(-1) for split, rows in splits.items() if bool(rows.any())}

    def round_column(j: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        ratio, values = numbers / scales[j // length], torch.empty_like(numbers)
        codes = torch.empty_like(numbers, dtype=torch.uint8)
        for split, rows in rows_of.items():
            codebook = unit_codebook(format_.bits, split)
            codes[rows] = codebook.codes_of(ratio[rows])
            values[rows] = codebook.values_of(codes[rows])
        return codes, values.mul_(scales[j // length])

    return ColumnGrid(
        round_column=round_column, with_codes=lambda codes: {**tensors, "codes": pack_codes(codes, format_.bits)}
    )


def _search_block(grouped: Tensor, importance: Tensor | None, bits: int) -> tuple[Scaled, Tensor]:
    """Returns the best of all splits and the exponent bits [rows] of each row's."""
    largest = grouped.abs().amax(-1)
    factors = _FEW_CODES if bits < 6 else _MANY_CODES
    halves = [(largest * factor).clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16) for factor in factors]
    scales = [(half, half.to(torch.float32)) for half in halves]
    best: Scaled | None = None
    exponent = torch.zeros(len(grouped), dtype=torch.uint8)
    for split in list_splits(bits):
        found = choose_scales(grouped, importance, unit_codebook(bits, split), scales)
        better = torch.ones(len(grouped), dtype=torch.bool)
        if best is not None:
            better = found.error.sum(1) < best.error.sum(1)
            found = _replace_rows(best, found, better)
        best, exponent = found, torch.where(better, split, exponent)
    assert best is not None
    return best, exponent


def _replace_rows(first: Scaled, second: Scaled, rows: Tensor) -> Scaled:
    wide = rows.unsqueeze(-1)
    return Scaled(
        torch.where(wide, second.stored, first.stored),
        torch.where(wide.unsqueeze(-1), second.codes, first.codes),
        torch.where(wide, second.error, first.error),
    )


SEARCHED_FLOAT = Codec(
    encode=encode_searched_float,
    decode=decode_searched_float,
    codes=searched_float_codes,
    grid=searched_float_grid,
)
