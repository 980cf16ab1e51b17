"""Two widths in one weight, the lower one an ordinary integer weight by itself: what is switched at run time.

    code   = round(w / s)                          of 8 bits, from -136 to 119
    prefix = floor((code + 8) / 16),               of 4 bits, from -8 to 7: the code rounded once more
    rest   = code - 16 prefix,                     of 4 bits, from -8 to 7

    weight at 8 bits = scale (prefix + rest / 16),    weight at 4 bits = scale prefix,    scale = 16 s

and with 2 bits of rest likewise. Both parts are stored as the codes of symmetric integer formats, in tensors of their
own, so that the kernels of these compute both products, x W' = x (scale prefix)' + x (scale rest)' / 16, and reading at
the lower width reads no byte of the rest. The range of a code is lopsided; scales have the sign with which it reaches
further for their group. Limits: the scale is that of the full width, and the rounding twice moves a weight at the lower
width by at most s / 2 beyond the half step of rounding once. Linear time.

Paper: Chen et al. 2025 (Double-Rounding, arXiv:2502.01199), whose widths have a scale each.
"""

from functools import partial

import torch
from torch import Tensor

from runtime.codecs.codec import Codec, StoredTensors, check_range, encode_by_rows, pick
from runtime.packing import pack_codes, unpack_codes
from runtime.quantizers.grid import LARGEST_SCALE, round_scale_up
from runtime.storage import Format


def encode_double_rounding(weight: Tensor, format_: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the codes of both parts and the scales; the importance is not looked at.

    Raises:
        ValueError: If the group size does not divide the row, or a weight is not finite or beyond float16.
    """
    check_range(weight, format_, LARGEST_SCALE)
    return encode_by_rows(weight, partial(_encode_rows, format_=format_))


def decode_double_rounding(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the values at the full width."""
    return read_double_rounding(tensors, format_, shape, format_.bits, rows)


def double_rounding_codes(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the codes of the full width as uint8, counted from the lowest on."""
    prefix, rest = _read_parts(tensors, format_, shape, rows)
    codes = (prefix.to(torch.int16) << format_.rest_bits) + rest
    return (codes - _code_range(format_)[0]).to(torch.uint8)


def read_double_rounding(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], width: int, rows: Tensor | None = None
) -> Tensor:
    """Returns the float32 weight at a width; at the lower one ``codes_rest`` is not looked at.

    Raises:
        ValueError: If the weight is not stored at this width.
    """
    if width not in format_.widths:
        msg = (
            f"a weight in '{format_.name}' must be read at one of {', '.join(map(str, format_.widths))} bits: "
            f"got width={width}. Read the next higher one."
        )
        raise ValueError(msg)
    scale = pick(tensors["scale"], rows).to(torch.float32)
    values = _read_prefix(tensors, format_, shape, rows).to(torch.float32)
    if width == format_.bits:
        values.add_(_read_rest(tensors, format_, shape, rows), alpha=2.0**-format_.rest_bits)
    return values.view(*scale.shape, -1).mul_(scale.unsqueeze(-1)).view(values.shape)


def _encode_rows(weight: Tensor, format_: Format) -> dict[str, Tensor]:
    grouped = weight.reshape(len(weight), format_.group_count(weight.shape[1]), -1)
    below = format_.rest_bits
    half = 1 << (below - 1)
    scale = _find_scale(grouped, format_)
    step = scale.to(torch.float32).unsqueeze(-1) * 2.0**-below
    lowest, highest = _code_range(format_)
    # An end of the range may lie in the middle between the last code and the next.
    codes = torch.round(grouped / step).clamp_(lowest, highest).to(torch.int32).flatten(1)
    prefix = (codes + half) >> below
    rest = codes - (prefix << below)
    return {
        "codes": pack_codes((prefix + (1 << (format_.prefix_bits - 1))).to(torch.uint8), format_.prefix_bits),
        "codes_rest": pack_codes((rest + half).to(torch.uint8), below),
        "scale": scale,
    }


def _find_scale(grouped: Tensor, format_: Format) -> Tensor:
    """Returns the float16 of least magnitude with which all codes of a group [rows, groups, length] are in range."""
    lowest, highest = _code_range(format_)
    low, high = (limit.to(torch.float64) for limit in (-grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)))
    # Half a step beyond the last code rounds to it.
    upright = torch.maximum(high / (highest + 0.5), low / (0.5 - lowest))
    turned = torch.maximum(low / (highest + 0.5), high / (0.5 - lowest))
    scale = round_scale_up(torch.minimum(upright, turned) * 2.0**format_.rest_bits, format_)
    return torch.where(turned < upright, -scale, scale)


def _code_range(format_: Format) -> tuple[int, int]:
    """Returns the codes whose prefix and rest are both in range."""
    half, half_rest = 1 << (format_.bits - 1), 1 << (format_.rest_bits - 1)
    return -half - half_rest, half - half_rest - 1


def _read_parts(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _read_prefix(tensors, format_, shape, rows), _read_rest(tensors, format_, shape, rows)


def _read_prefix(tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None) -> Tensor:
    return _read_signed(tensors["codes"], format_.prefix_bits, shape[1], rows)


def _read_rest(tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None) -> Tensor:
    return _read_signed(tensors["codes_rest"], format_.rest_bits, shape[1], rows)


def _read_signed(codes: Tensor, bits: int, columns: int, rows: Tensor | None) -> Tensor:
    return unpack_codes(pick(codes, rows), bits, columns).to(torch.int8).sub_(1 << (bits - 1))


DOUBLE_ROUNDING = Codec(
    encode=encode_double_rounding,
    decode=decode_double_rounding,
    codes=double_rounding_codes,
    reads_importance=False,
    at_width=read_double_rounding,
)
