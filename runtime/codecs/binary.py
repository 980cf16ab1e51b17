"""One bit a weight: each group has two values, and every weight takes one of them.

    symmetric:   value = +-scale            asymmetric:   value = low or high

One bit cannot be an integer grid with a zero: its symmetric grid would be {-scale, 0}. Here the error is least,
weighted by the importance h of the columns: the scale is sum(h |w|) / sum(h), and low and high are the means of the two
parts of the sorted group for which

    (sum_low h w)^2 / sum_low h + (sum_high h w)^2 / sum_high h

is largest, which is one-dimensional 2-means solved exactly; rounding the values to float16 comes on top. A scale that
is a power of two is the better of the two next to the mean. n log n for the sort.

Papers: Rastegari et al. 2016 (XNOR-Net, arXiv:1603.05279, equation 6) for the symmetric scale; Gronlund et al. 2017
(arXiv:1701.07204) for clusters being intervals of the sorted numbers.
"""

import torch
from torch import Tensor

from runtime.codecs.codec import Codec, ColumnGrid, StoredTensors, check_range, pick
from runtime.packing import pack_codes, unpack_codes
from runtime.powers import nearest_exponent, power_of_two
from runtime.quantizers.grid import LARGEST_SCALE, SMALLEST_SCALE
from runtime.storage import Format


def encode_binary(weight: Tensor, format_: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the codes with their two values of each group.

    Raises:
        ValueError: If the group size does not divide the row, or a weight is not finite or beyond float16.
    """
    check_range(weight, format_, LARGEST_SCALE)
    groups = format_.group_count(weight.shape[1])
    grouped = weight.reshape(weight.shape[0], groups, -1)
    h = torch.ones_like(grouped) if importance is None else importance.view(groups, -1).expand_as(grouped)
    if not format_.symmetric:
        low, high = (value.to(torch.float16) for value in _find_two_means(grouped, h))
        codes = (grouped - low.float().unsqueeze(-1)).abs() > (grouped - high.float().unsqueeze(-1)).abs()
        return {"codes": _pack(codes, weight), "low": low, "high": high}
    scale = (h * grouped.abs()).sum(-1) / h.sum(-1)
    if format_.scale_type == "pow2":
        stored = nearest_exponent(scale.clamp(min=SMALLEST_SCALE)).to(torch.int8)
    else:
        stored = scale.to(torch.float16)
    return {"codes": _pack(grouped >= 0, weight), "scale": stored}


def decode_binary(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the value that each code stands for."""
    codes = binary_codes(tensors, format_, shape, rows).bool()
    low, high = _read_values(tensors, format_, rows)
    grouped = codes.view(*low.shape, -1)
    return torch.where(grouped, high.unsqueeze(-1), low.unsqueeze(-1)).view(codes.shape)


def binary_codes(tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None) -> Tensor:
    """Returns the codes, 0 for the lower value."""
    return unpack_codes(pick(tensors["codes"], rows), 1, shape[1])


def binary_grid(tensors: StoredTensors, format_: Format, shape: tuple[int, int]) -> ColumnGrid:
    """Returns the two values of each column's groups."""
    lows, highs = (values.T.contiguous() for values in _read_values(tensors, format_, None))
    length = shape[1] // len(lows)

    def round_column(j: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        low, high = lows[j // length], highs[j // length]
        codes = (numbers - low).abs() > (numbers - high).abs()
        return codes.to(torch.uint8), torch.where(codes, high, low)

    return ColumnGrid(round_column=round_column, with_codes=lambda codes: {**tensors, "codes": pack_codes(codes, 1)})


def _read_values(tensors: StoredTensors, format_: Format, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the lower and the higher value [rows, groups] of each group."""
    if not format_.symmetric:
        return pick(tensors["low"], rows).to(torch.float32), pick(tensors["high"], rows).to(torch.float32)
    scale = pick(tensors["scale"], rows)
    high = power_of_two(scale) if format_.scale_type == "pow2" else scale.to(torch.float32)
    return -high, high


def _pack(codes: Tensor, weight: Tensor) -> Tensor:
    return pack_codes(codes.to(torch.uint8).view(weight.shape), 1)


def _find_two_means(grouped: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the lower and the higher mean [rows, groups] of the best split; equal where one weight is alone."""
    ordered, order = grouped.double().sort(dim=-1)
    weights = h.double().gather(-1, order)
    mass, moment = weights.cumsum(-1), (weights * ordered).cumsum(-1)
    all_mass, all_moment = mass[..., -1:], moment[..., -1:]
    if grouped.shape[-1] == 1:
        return grouped[..., 0], grouped[..., 0]
    left_mass, left_moment = mass[..., :-1], moment[..., :-1]
    gain = left_moment.square() / left_mass + (all_moment - left_moment).square() / (all_mass - left_mass)
    split = gain.argmax(-1, keepdim=True)
    low = left_moment.gather(-1, split) / left_mass.gather(-1, split)
    high = (all_moment - left_moment.gather(-1, split)) / (all_mass - left_mass.gather(-1, split))
    return low.squeeze(-1).float(), high.squeeze(-1).float()


BINARY = Codec(encode=encode_binary, decode=decode_binary, codes=binary_codes, grid=binary_grid)
