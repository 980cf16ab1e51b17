"""Half-quadratic quantization: zero point and scale from an l_p norm of the error with p < 1; no inputs are read.

    minimise over z, s:   sum |w - s (q - z)|^p,      q = clamp(round(w / s + z)),

so that a few large errors count little beside many small ones. Splitting off e, the large part of the error, makes it
quadratic in z and s for e fixed. One iteration, with x = (w - s (q - z)) / s_0 in steps of the first scale:

    e <- s_0 sign(x) max(|x| - |x|^(p-1) / beta, 0)
    z <- mean(q - (w - e) / s),    s <- sum (w - e)(q - z) / sum (q - z)^2,    beta <- kappa beta.

The packed weight stores zero points as codes and scales as float16: z is rounded to a code whenever an iterate is
judged, and every group keeps its best storable iterate, round-to-nearest included. ``round_zero_point=False`` leaves z
as it is, to see what the rounding costs. Linear time for each iteration.

Paper: Badri and Shaji 2023, Half-Quadratic Quantization of Large Machine Learning Models (mobiusml.github.io/hqq_blog).
There z alone moves and stays a float, and x is not in steps, so that beta depends on the size of the weights.
"""

import torch
from torch import Tensor

from runtime.formats import Format
from runtime.quantization import QuantizedWeight
from runtime.quantizers.grid import Grid, find_grid, largest_code, round_scale
from runtime.quantizers.input_statistics import InputStatistics

_KAPPA = 1.01


def quantize_hqq(
    weight: Tensor,
    format_: Format,
    statistics: InputStatistics | None = None,
    *,
    norm_power: float = 0.7,
    iterations: int = 20,
    beta: float = 10.0,
) -> QuantizedWeight:
    """Returns the weight rounded to nearest on half-quadratic grids.

    Args:
        weight: [out_features, in_features], finite.
        format_: An integer format whose group size divides in_features.
        statistics: Not read.
        norm_power: p, above 0, at most 1.
        iterations: Of the alternation; at least 1.
        beta: First weight of the quadratic term, in steps; positive.

    Raises:
        ValueError: If an argument is out of range, the group size does not divide the row, or a scale is not a finite
            float16.
    """
    scale, zero_point = find_half_quadratic_grid(
        weight, format_, norm_power=norm_power, iterations=iterations, beta=beta
    )
    grid = Grid(format=format_, scale=scale.to(torch.float16), zero_point=zero_point)
    return grid.quantized(grid.codes_of(weight))


def find_half_quadratic_grid(
    weight: Tensor,
    format_: Format,
    *,
    norm_power: float = 0.7,
    iterations: int = 20,
    beta: float = 10.0,
    round_zero_point: bool = True,
) -> tuple[Tensor, Tensor]:
    """Returns scales (float16 numbers) and zero points, both [out_features, groups] float32.

    The arguments are those of ``quantize_hqq``, and ``round_zero_point``: False leaves the zero points of an
    asymmetric format as they are, which no format stores.

    Raises:
        ValueError: As ``quantize_hqq``.
    """
    if not (0.0 < norm_power <= 1.0 and iterations >= 1 and beta > 0.0):
        msg = (
            "norm_power must be in (0, 1], iterations at least 1, beta positive: got "
            f"norm_power={norm_power}, iterations={iterations}, beta={beta}. Correct them."
        )
        raise ValueError(msg)
    grid = find_grid(weight, format_)
    first = grid.scale.to(torch.float32).unsqueeze(-1)
    grouped = weight.to(torch.float32).reshape(*grid.scale.shape, -1)
    best = scale, zero_point = first, grid.zero_point.unsqueeze(-1)
    codes, error = _round(grouped, scale, zero_point, format_)
    least = _norm(error / first, norm_power)
    for _ in range(iterations):
        target = grouped - first * _shrink(error / first, beta, norm_power)
        if not format_.symmetric:
            zero_point = (codes - target / scale).mean(-1, keepdim=True).clamp_(0, largest_code(format_))
            zero_point = torch.round(zero_point) if round_zero_point else zero_point
        scale = _fit_scale(target, codes - zero_point, scale, format_)
        codes, error = _round(grouped, scale, zero_point, format_)
        now = _norm(error / first, norm_power)
        better = now < least
        best = torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1])
        least = torch.where(better, now, least)
        beta *= _KAPPA
    return best[0].squeeze(-1), best[1].squeeze(-1)


def _round(grouped: Tensor, scale: Tensor, zero_point: Tensor, format_: Format) -> tuple[Tensor, Tensor]:
    """Returns the nearest codes and what they leave of the weight, both [out_features, groups, group length]."""
    codes = torch.round(grouped / scale + zero_point).clamp_(0, largest_code(format_))
    return codes, grouped - scale * (codes - zero_point)


def _shrink(x: Tensor, beta: float, norm_power: float) -> Tensor:
    magnitude = x.abs()
    # Zero to a negative power is infinite: what is zero stays zero.
    return x.sign() * (magnitude - magnitude.pow(norm_power - 1.0) / beta).clamp_(min=0.0)


def _fit_scale(target: Tensor, direction: Tensor, scale: Tensor, format_: Format) -> Tensor:
    power = direction.square().sum(-1, keepdim=True)
    fitted = (target * direction).sum(-1, keepdim=True) / power
    return round_scale(torch.where(power > 0, fitted, scale), format_).to(torch.float32)


def _norm(x: Tensor, norm_power: float) -> Tensor:
    return x.abs().pow(norm_power).sum(-1, keepdim=True)
