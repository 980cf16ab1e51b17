"""Three values a group: -scale, 0 and scale, five weights to a byte.

    value = scale[i, g] * t,   t = -1, 0, 1

A weight of three equally likely values has an entropy of log2 3 = 1.585 bits; it takes 1.6. The error weighted by the
importance h of the columns is least where the k largest magnitudes of the group are not zero and

    (sum_k h |w|)^2 / sum_k h

is largest over k, with scale = sum_k h |w| / sum_k h: for any scale the best t is the nearest, so that the weights
that are not zero are always those above scale / 2, and all k are tried after a sort. Rounding the scale to float16
comes on top. Formats of element ``median`` take the rule that such networks are trained with instead,
t = RoundClip(w / median|w|, -1, 1), which gives back their weights.

Papers: Li and Liu 2016 (Ternary Weight Networks, arXiv:1605.04711, equation 4); Nielsen and Schneider-Kamp 2024 (BitNet
b1.58 Reloaded, arXiv:2407.09527) for the median.
"""

from functools import partial

import torch
from torch import Tensor

from runtime.codecs.codec import Codec, ColumnGrid, StoredTensors, check_range, encode_by_rows, group_importance, pick
from runtime.packing import pack_trits, unpack_trits
from runtime.quantizers.grid import LARGEST_SCALE
from runtime.storage import Format


def encode_ternary(weight: Tensor, format_: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the packed digits t + 1, and the scale of each group.

    Raises:
        ValueError: If the group size does not divide the row, or a weight is not finite or beyond float16.
    """
    check_range(weight, format_, LARGEST_SCALE)
    return encode_by_rows(weight, partial(_encode_rows, format_=format_, importance=importance))


def decode_ternary(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns scale * t."""
    scale = pick(tensors["scale"], rows).to(torch.float32)
    digits = ternary_codes(tensors, format_, shape, rows).to(torch.float32).sub_(1.0)
    return digits.view(*scale.shape, -1).mul_(scale.unsqueeze(-1)).view(digits.shape)


def ternary_codes(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns t + 1 as uint8."""
    return unpack_trits(pick(tensors["codes"], rows), shape[1])


def ternary_grid(tensors: StoredTensors, format_: Format, shape: tuple[int, int]) -> ColumnGrid:
    """Returns -scale, 0 and scale of each column's groups."""
    scales = tensors["scale"].T.to(torch.float32).contiguous()
    length = shape[1] // len(scales)

    def round_column(j: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        scale = scales[j // length]
        codes = _nearest_codes(numbers, scale)
        return codes, codes.to(torch.float32).sub_(1.0).mul_(scale)

    return ColumnGrid(round_column=round_column, with_codes=lambda codes: {**tensors, "codes": pack_trits(codes)})


def _encode_rows(weight: Tensor, format_: Format, importance: Tensor | None) -> dict[str, Tensor]:
    grouped = weight.reshape(len(weight), format_.group_count(weight.shape[1]), -1)
    magnitude = grouped.abs()
    if format_.element == "median":
        scale = _median(magnitude)
    else:
        scale = _find_scale(magnitude, group_importance(importance, grouped))
    stored = scale.to(torch.float16)
    codes = _nearest_codes(grouped, stored.to(torch.float32).unsqueeze(-1))
    return {"codes": pack_trits(codes.flatten(1)), "scale": stored}


def _nearest_codes(numbers: Tensor, scale: Tensor) -> Tensor:
    return 1 + (numbers > scale / 2).to(torch.uint8) - (numbers < -scale / 2).to(torch.uint8)


def _median(magnitude: Tensor) -> Tensor:
    """Returns the median of each group; the mean of the two in the middle of an even number."""
    ordered, length = magnitude.sort(dim=-1).values, magnitude.shape[-1]
    return (ordered[..., (length - 1) // 2] + ordered[..., length // 2]) / 2


def _find_scale(magnitude: Tensor, h: Tensor) -> Tensor:
    """Returns the scale [rows, groups] of the least weighted error."""
    ordered, order = magnitude.double().sort(dim=-1, descending=True)
    weights = h.double().gather(-1, order)
    mass, moment = weights.cumsum(-1), (weights * ordered).cumsum(-1)
    best = (moment.square() / mass).argmax(-1, keepdim=True)
    return (moment.gather(-1, best) / mass.gather(-1, best)).squeeze(-1).float()


TERNARY = Codec(encode=encode_ternary, decode=decode_ternary, codes=ternary_codes, grid=ternary_grid)
