"""Elements of few bits with a scale for each group: FP8 and its like, MX and NV block formats.

    value = element(code) * scale[i, g]         scale a float16, or a power of two in one byte (E8M0: 2^(byte - 127))
    value = element(code) * (scale[i, g] * t)   scale an E4M3 float in one byte, t one float32 for the whole weight

The scale is chosen by the error it leaves (``codebook.choose_scales``) among those that put the largest magnitude of
the group at the largest element or clip it. For E8M0 these include the exponent floor(log2 max|w|) - emax of the OCP
specification, and for E4M3 the scale nearest to max|w| / (largest t), t = max|W| / (448 largest): what is chosen here
never leaves more weighted squared error than the usual rules do.

Sources: OCP Microscaling Formats (MX) v1.0, sections 5 and 6.3; Rouhani et al. 2023 (arXiv:2310.10537); Chen et al.
2025 (INT v.s. FP, arXiv:2510.25602) for NVINT4.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from runtime.codecs.codebook import Codebook, Scaled, choose_scales
from runtime.codecs.codec import Codec, ColumnGrid, StoredTensors, check_range, pick
from runtime.elements import ELEMENTS
from runtime.packing import pack_codes, unpack_codes
from runtime.powers import LEAST_EXPONENT, MOST_EXPONENT, floor_exponent, power_of_two
from runtime.quantizers.grid import LARGEST_SCALE, SMALLEST_SCALE
from runtime.storage import Format

Scales = Iterator[tuple[Tensor, Tensor]]
_BLOCK_ROWS = 4096
# Of the range. Few codes gain most from clipping; 8 bits have room, and take longer.
_FACTORS = {4: tuple(1.0 - 0.05 * step for step in range(11)), 6: (1.0, 0.9, 0.8, 0.7), 8: (1.0, 0.875, 0.75)}


@cache
def codebook_of(element: str) -> Codebook:
    """Returns the codebook of a name in ``ELEMENTS``."""
    return Codebook.of(ELEMENTS[element].values)


def encode_scaled(weight: Tensor, format_: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the codes and scales of the least error.

    Raises:
        ValueError: If the group size does not divide the row, or a weight is not finite or out of reach of the scales.
    """
    scale_type = _SCALE_TYPES[format_.scale_type]
    check_range(weight, format_, scale_type.largest * ELEMENTS[format_.element].largest)
    groups = format_.group_count(weight.shape[1])
    scale_unit = _find_scale_unit(weight, format_)
    parts: list[Scaled] = []
    for start in range(0, len(weight), _BLOCK_ROWS):
        grouped = weight[start : start + _BLOCK_ROWS].reshape(-1, groups, weight.shape[1] // groups)
        scales = scale_type.propose(grouped, format_, scale_unit)
        parts.append(choose_scales(grouped, importance, codebook_of(format_.element), scales))
    codes = torch.cat([part.codes for part in parts]).view(weight.shape)
    tensors = {"codes": pack_codes(codes, format_.bits), "scale": torch.cat([part.stored for part in parts])}
    return {**tensors, "scale_unit": scale_unit} if format_.scale_type == "e4m3" else tensors


def decode_scaled(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the element of each code times its scale."""
    scale = read_scales(tensors, format_, rows)
    codes = scaled_codes(tensors, format_, shape, rows)
    values = codebook_of(format_.element).values_of(codes).view(*scale.shape, -1)
    return values.mul_(scale.unsqueeze(-1)).view(codes.shape)


def scaled_codes(tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None) -> Tensor:
    """Returns the codes as uint8."""
    return unpack_codes(pick(tensors["codes"], rows), format_.bits, shape[1])


def scaled_grid(tensors: StoredTensors, format_: Format, shape: tuple[int, int]) -> ColumnGrid:
    """Returns the elements times the scales of each column's groups."""
    scales, codebook = read_scales(tensors, format_).T.contiguous(), codebook_of(format_.element)
    length = shape[1] // len(scales)

    def round_column(j: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        scale = scales[j // length]
        codes = codebook.codes_of(torch.where(scale == 0, 0.0, numbers / scale))
        return codes, codebook.values_of(codes).mul_(scale)

    return ColumnGrid(
        round_column=round_column, with_codes=lambda codes: {**tensors, "codes": pack_codes(codes, format_.bits)}
    )


def read_scale_unit(tensors: StoredTensors, format_: Format) -> float:
    """Returns the number t that the stored scales are multiplied by."""
    return float(tensors["scale_unit"]) if format_.scale_type == "e4m3" else 1.0


def read_scales(tensors: StoredTensors, format_: Format, rows: Tensor | None = None) -> Tensor:
    """Returns the scales [n, groups] in float32, with all that they are multiplied by."""
    scale = _SCALE_TYPES[format_.scale_type].read(pick(tensors["scale"], rows))
    return scale * tensors["scale_unit"] if format_.scale_type == "e4m3" else scale


def _find_scale_unit(weight: Tensor, format_: Format) -> Tensor:
    """Returns t [1]: with it the largest scale of a group is the largest E4M3 number."""
    wanted = weight.abs().amax() / (ELEMENTS["e4m3"].largest * ELEMENTS[format_.element].largest)
    return wanted.clamp(min=torch.finfo(torch.float32).tiny).view(1)


def _propose_half(grouped: Tensor, format_: Format, scale_unit: Tensor) -> Scales:
    spanning = grouped.abs().amax(-1) / ELEMENTS[format_.element].largest
    for factor in _FACTORS[format_.bits]:
        stored = (spanning * factor).clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16)
        yield stored, stored.to(torch.float32)


def _propose_powers(grouped: Tensor, format_: Format, scale_unit: Tensor) -> Scales:
    largest = torch.tensor(ELEMENTS[format_.element].largest)
    usual = floor_exponent(grouped.abs().amax(-1)) - floor_exponent(largest)
    for step in (0, 1, -1):
        exponent = (usual + step).clamp(LEAST_EXPONENT, MOST_EXPONENT)
        yield (exponent + MOST_EXPONENT).to(torch.uint8), power_of_two(exponent)


def _propose_e4m3(grouped: Tensor, format_: Format, scale_unit: Tensor) -> Scales:
    spanning = grouped.abs().amax(-1) / (ELEMENTS[format_.element].largest * scale_unit)
    for factor in _FACTORS[format_.bits]:
        stored = codebook_of("e4m3").codes_of(spanning * factor)
        yield stored, codebook_of("e4m3").values_of(stored) * scale_unit


@dataclass(frozen=True)
class _ScaleType:
    """Which scales to try of groups in a format, how stored ones are read, and the largest there is."""

    propose: Callable[[Tensor, Format, Tensor], Scales]
    read: Callable[[Tensor], Tensor]
    largest: float


_SCALE_TYPES: dict[str, _ScaleType] = {
    "fp16": _ScaleType(_propose_half, lambda stored: stored.to(torch.float32), LARGEST_SCALE),
    "e8m0": _ScaleType(
        _propose_powers, lambda stored: power_of_two(stored.to(torch.int32) - MOST_EXPONENT), 2.0**MOST_EXPONENT
    ),
    "e4m3": _ScaleType(_propose_e4m3, lambda stored: codebook_of("e4m3").values_of(stored), math.inf),
}

SCALED_ELEMENTS = Codec(encode=encode_scaled, decode=decode_scaled, codes=scaled_codes, grid=scaled_grid)
