"""Sums of binary planes, each with a scale of its own for every group: binary-coded quantization.

    value = sum_k scale[i, g, k] b_k,     b_k = -1, 1,     k = 1 .. bits

    value = scale[i, g, 1] b_1 + scale[i, g, 2] b_2,   b_k = 0, 1      (element ``zero_one``, dual binary)

An integer grid is the case of scales in ratios of two; here they are free, so that the 2^bits values lie where the
weights are. Alternating least squares, weighted by the importance of the columns: with the scales given, each weight
takes the nearest of all sums; with the planes given, the scales solve (B' h B) scale = B' h w. Neither step raises the
error, and the best of all rounds, after rounding the scales as they are stored, is kept. The result is a local minimum:
it is started from the planes of greedy residuals and from integer grids, whole and clipped (dual binary: from the
levels -s, 0, s, 2s and their mirror image), and the best of all is kept. A round takes time linear in the weights.

A scale that is a power of two makes products shifts. Papers: You et al. 2024 (ShiftAddLLM, arXiv:2406.05981; there a
scale is a sum of up to three powers); Chen et al. 2024 (DB-LLM, arXiv:2402.11960) for the dual binary.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from runtime.codecs.codec import Codec, ColumnGrid, StoredTensors, check_range, encode_by_rows, group_importance, pick
from runtime.packing import pack_codes, unpack_codes
from runtime.powers import nearest_exponent, power_of_two
from runtime.quantizers.grid import LARGEST_SCALE, SMALLEST_SCALE
from runtime.storage import Format

_ROUNDS = 10
_CLIPPING = (1.0, 0.85, 0.7)
# Holds the scales where planes do not tell them apart, relative to the mean of the diagonal.
_DAMPING = 1e-6


def encode_planes(weight: Tensor, format_: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the codes, whose bit k is plane k, and the scales.

    Raises:
        ValueError: If the group size does not divide the row, or a weight is not finite or beyond float16.
    """
    check_range(weight, format_, LARGEST_SCALE)
    return encode_by_rows(weight, partial(_encode_rows, format_=format_, importance=importance))


def decode_planes(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the sum that each code stands for."""
    levels = _levels(_read_scale(pick(tensors["scale"], rows), format_), format_)
    codes = planes_codes(tensors, format_, shape, rows)
    return levels.gather(-1, codes.to(torch.int64).view(*levels.shape[:2], -1)).view(codes.shape)


def planes_codes(tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None) -> Tensor:
    """Returns the codes as uint8."""
    return unpack_codes(pick(tensors["codes"], rows), format_.bits, shape[1])


def planes_grid(tensors: StoredTensors, format_: Format, shape: tuple[int, int]) -> ColumnGrid:
    """Returns the sums of each column's groups."""
    levels = _levels(_read_scale(tensors["scale"], format_), format_).transpose(0, 1).contiguous()
    length = shape[1] // len(levels)

    def round_column(j: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        sums = levels[j // length]
        codes = (numbers.unsqueeze(-1) - sums).abs().argmin(-1, keepdim=True)
        return codes[:, 0].to(torch.uint8), sums.gather(-1, codes)[:, 0]

    return ColumnGrid(
        round_column=round_column, with_codes=lambda codes: {**tensors, "codes": pack_codes(codes, format_.bits)}
    )


def _encode_rows(weight: Tensor, format_: Format, importance: Tensor | None) -> dict[str, Tensor]:
    grouped = weight.reshape(len(weight), format_.group_count(weight.shape[1]), -1)
    h = group_importance(importance, grouped)
    best_error = torch.full(grouped.shape[:2], torch.inf)
    best_codes = torch.zeros(grouped.shape, dtype=torch.uint8)
    best_scale = _store_scale(torch.zeros(*grouped.shape[:2], format_.bits), format_)
    for scale in _list_starts(grouped, format_):
        for _ in range(_ROUNDS):
            stored = _store_scale(scale, format_)
            levels = _levels(_read_scale(stored, format_), format_)
            codes = _nearest_codes(grouped, levels)
            error = (levels.gather(-1, codes.to(torch.int64)) - grouped).square_().mul_(h).sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_codes = torch.where(better.unsqueeze(-1), codes, best_codes)
            best_scale = torch.where(better.unsqueeze(-1), stored, best_scale)
            scale = _refit_scale(grouped, h, scale, codes, format_)
    return {"codes": pack_codes(best_codes.flatten(1), format_.bits), "scale": best_scale}


def _list_starts(grouped: Tensor, format_: Format) -> Iterator[Tensor]:
    """Yields the scales [rows, groups, bits] to start from."""
    low, high = grouped.amin(-1), grouped.amax(-1)
    if format_.element == "zero_one":
        up, down = torch.maximum(-low, high / 2), torch.minimum(-high, low / 2)
        for factor in _CLIPPING:
            # A step s with the levels -s, 0, s and 2s; below zero their mirror image.
            yield from (torch.stack([2 * factor * step, -factor * step], dim=-1) for step in (up, down))
        return
    residual, greedy = grouped, []
    for _ in range(format_.bits):
        greedy.append(residual.abs().mean(-1))
        residual = residual - torch.where(residual >= 0, 1.0, -1.0) * greedy[-1].unsqueeze(-1)
    yield torch.stack(greedy, dim=-1)
    ratios = 2.0 ** torch.arange(format_.bits)
    spanning = torch.maximum(-low, high).unsqueeze(-1) * ratios / ratios.sum()
    yield from (spanning * factor for factor in _CLIPPING)


def _plane_values(format_: Format, device: torch.device) -> Tensor:
    """Returns the value of every plane for every code, [2^bits, bits]."""
    codes = torch.arange(1 << format_.bits, device=device).unsqueeze(-1)
    bits = (codes >> torch.arange(format_.bits, device=device) & 1).to(torch.float32)
    return bits if format_.element == "zero_one" else 2 * bits - 1


def _levels(scale: Tensor, format_: Format) -> Tensor:
    """Returns the sums [rows, groups, 2^bits] by code, added plane by plane."""
    planes = _plane_values(format_, scale.device)
    levels = scale[..., :1] * planes[:, 0]
    for k in range(1, format_.bits):
        levels = levels + scale[..., k : k + 1] * planes[:, k]
    return levels


def _nearest_codes(grouped: Tensor, levels: Tensor) -> Tensor:
    ordered, codes = levels.sort(dim=-1)
    middles = (ordered[..., 1:] + ordered[..., :-1]) / 2
    # Up to fifteen comparisons of whole tensors are faster than a search for each number.
    places = torch.zeros(grouped.shape, dtype=torch.uint8, device=grouped.device)
    for k in range(middles.shape[-1]):
        places += grouped > middles[..., k : k + 1]
    return codes.to(torch.uint8).gather(-1, places.to(torch.int64))


def _refit_scale(grouped: Tensor, h: Tensor, scale: Tensor, codes: Tensor, format_: Format) -> Tensor:
    """Returns the scales of least weighted error for the planes of the codes, near ``scale`` where these are many."""
    shifts = torch.arange(format_.bits, dtype=torch.uint8, device=codes.device).unsqueeze(-1)
    planes = (codes.unsqueeze(-2) >> shifts).bitwise_and_(1).to(torch.float32)
    if format_.element != "zero_one":
        planes.mul_(2.0).sub_(1.0)
    left = grouped.unsqueeze(-2) - scale.unsqueeze(-2) @ planes
    weighted = (planes * h.unsqueeze(-2)).transpose(-1, -2)
    gram, moment = (planes @ weighted).double(), (left @ weighted).double()
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    damped = gram + _DAMPING * torch.where(mean > 0, mean, 1.0) * torch.eye(format_.bits, dtype=gram.dtype)
    step: Tensor = torch.linalg.solve(damped, moment.transpose(-1, -2)).squeeze(-1)
    return scale + step.to(torch.float32)


def _store_scale(scale: Tensor, format_: Format) -> Tensor:
    if format_.scale_type == "pow2":
        # The sums of planes of -1 and 1 are the same for both signs of a scale.
        return nearest_exponent(scale.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE)).to(torch.int8)
    return scale.clamp(-LARGEST_SCALE, LARGEST_SCALE).to(torch.float16)


def _read_scale(stored: Tensor, format_: Format) -> Tensor:
    return power_of_two(stored) if format_.scale_type == "pow2" else stored.to(torch.float32)


PLANES = Codec(encode=encode_planes, decode=decode_planes, codes=planes_codes, grid=planes_grid)
