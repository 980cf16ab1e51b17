"""Groups that choose the type of their elements from a menu, with a selector of one or two bits.

    value = type[selector[i, g]](code) * scale[i, g]

    bitmod, 3 bits:    {0, +-1, +-2, +-4} and one of 3, -3, 6, -6
    bitmod, 4 bits:    {0, +-1, +-2, +-3, +-4, +-6, +-8, +-12} and one of 10, -10, 16, -16
    int_or_float:      two's complement integers, or E2M1, E2M3, E4M3 at 4, 6, 8 bits

The fourth value takes the code that a float wastes on a second zero: 3 and 10 refine, 6 and 16 stretch one side. An
integer has less noise than a float where the crest factor of a group, max|w| / rms, is low (below about 2.4 at 4 bits
and 5 at 8), because its steps are even. The crest factor only predicts this: here every type is tried with every scale
of a list and that of the least weighted squared error is kept, which is the highest signal to noise ratio (QSNR). No
type is ever worse than the scale max|w| / (its largest magnitude) makes it. Linear time for each pair.

Papers: Chen et al. 2024 (BitMoD, arXiv:2411.11745); Chen et al. 2025 (INT v.s. FP, arXiv:2510.25602).
"""

from collections.abc import Iterator
from functools import cache, partial

import torch
from torch import Tensor

from runtime.codecs.codebook import Codebook, Scaled, choose_better, choose_scales
from runtime.codecs.codec import Codec, ColumnGrid, StoredTensors, check_range, encode_by_rows, pick
from runtime.elements import ELEMENTS
from runtime.packing import pack_codes, unpack_codes
from runtime.quantizers.grid import LARGEST_SCALE, SMALLEST_SCALE
from runtime.storage import SELECTOR_BITS, Format

# Few codes gain most from clipping; 8 bits have room, and take longer.
_FACTORS = {
    3: tuple(1.0 - 0.05 * step for step in range(11)),
    4: tuple(1.0 - 0.05 * step for step in range(11)),
    6: (1.0, 0.9, 0.8, 0.7),
    8: (1.0, 0.875, 0.75),
}
# By bits: the magnitudes of the basic type, and the values that one code is given to.
_BITMOD = {
    3: ((1.0, 2.0, 4.0), (3.0, -3.0, 6.0, -6.0)),
    4: ((1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0), (10.0, -10.0, 16.0, -16.0)),
}
_FLOATS = {4: "e2m1", 6: "e2m3", 8: "e4m3"}


@cache
def list_types(menu: str, bits: int) -> tuple[tuple[float, ...], ...]:
    """Returns the values by code of each type of a menu: ``bitmod`` or ``int_or_float``."""
    if menu == "bitmod":
        magnitudes, specials = _BITMOD[bits]
        base = (0.0, *magnitudes, *(-magnitude for magnitude in magnitudes))
        return tuple((*base, special) for special in specials)
    half = 1 << (bits - 1)
    integers = tuple(float((code ^ half) - half) for code in range(1 << bits))
    return (integers, ELEMENTS[_FLOATS[bits]].values)


def encode_chosen_type(weight: Tensor, format_: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Returns codes, scales and selectors of the least error.

    Raises:
        ValueError: If the group size does not divide the row, or a weight is not finite or beyond float16.
    """
    check_range(weight, format_, LARGEST_SCALE)
    return encode_by_rows(weight, partial(_encode_rows, format_=format_, importance=importance))


def decode_chosen_type(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the value of each code in its group's type, times the scale."""
    scale = pick(tensors["scale"], rows).to(torch.float32)
    selector = unpack_codes(pick(tensors["selector"], rows), SELECTOR_BITS[format_.element], scale.shape[1])
    codes = chosen_type_codes(tensors, format_, shape, rows)
    values = torch.tensor(list_types(format_.element, format_.bits), device=codes.device).flatten()
    places = codes.to(torch.int32).view(*scale.shape, -1) + (selector.to(torch.int32) << format_.bits).unsqueeze(-1)
    return values[places].mul_(scale.unsqueeze(-1)).view(codes.shape)


def chosen_type_codes(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the codes as uint8."""
    return unpack_codes(pick(tensors["codes"], rows), format_.bits, shape[1])


def chosen_type_grid(tensors: StoredTensors, format_: Format, shape: tuple[int, int]) -> ColumnGrid:
    """Returns the values of the types of each column's groups times the scales."""
    scales = tensors["scale"].T.to(torch.float32).contiguous()
    selectors = unpack_codes(tensors["selector"], SELECTOR_BITS[format_.element], len(scales)).T.contiguous()
    codebooks = [Codebook.of(values) for values in list_types(format_.element, format_.bits)]
    length = shape[1] // len(scales)

    def round_column(j: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        ratio, values = numbers / scales[j // length], torch.empty_like(numbers)
        codes = torch.empty_like(numbers, dtype=torch.uint8)
        for index, codebook in enumerate(codebooks):
            rows = selectors[j // length] == index
            codes[rows] = codebook.codes_of(ratio[rows])
            values[rows] = codebook.values_of(codes[rows])
        return codes, values.mul_(scales[j // length])

    return ColumnGrid(
        round_column=round_column, with_codes=lambda codes: {**tensors, "codes": pack_codes(codes, format_.bits)}
    )


def _encode_rows(weight: Tensor, format_: Format, importance: Tensor | None) -> dict[str, Tensor]:
    grouped = weight.reshape(len(weight), format_.group_count(weight.shape[1]), -1)
    best: Scaled | None = None
    selector = torch.zeros(grouped.shape[:2], dtype=torch.uint8)
    for index, values in enumerate(list_types(format_.element, format_.bits)):
        found = choose_scales(grouped, importance, Codebook.of(values), _propose(grouped, values, format_.bits))
        if best is not None:
            selector = torch.where(found.error < best.error, index, selector)
        best = found if best is None else choose_better(best, found)
    assert best is not None
    return {
        "codes": pack_codes(best.codes.flatten(1), format_.bits),
        "scale": best.stored,
        "selector": pack_codes(selector, SELECTOR_BITS[format_.element]),
    }


def _propose(grouped: Tensor, values: tuple[float, ...], bits: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields scales that put the magnitude at the end of the type, reach both of its ends, or clip these."""
    finite = [value for value in values if abs(value) < float("inf")]
    low, high = min(finite), max(finite)
    spanning = torch.maximum(grouped.amax(-1) / high, grouped.amin(-1) / low)
    usual = grouped.abs().amax(-1) / max(-low, high)
    for scale in (usual, *(spanning * factor for factor in _FACTORS[bits])):
        stored = scale.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16)
        yield stored, stored.to(torch.float32)


CHOSEN_TYPE = Codec(
    encode=encode_chosen_type, decode=decode_chosen_type, codes=chosen_type_codes, grid=chosen_type_grid
)
