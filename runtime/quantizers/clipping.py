"""Clipping: the range of each group is shrunk by the factor that makes its rounding error least.

    minimise over r:   sum_j h_j (w_j - round_r(w_j))^2,      round_r on the grid of the range [r low, r high],

h the diagonal of H where there are input statistics, else one. Weights beyond the range go to its ends; the steps
within become finer. The error is not unimodal in r (weights hop between codes), so a list of factors is tried and the
best kept, group by group; the factor one is round-to-nearest, which is therefore never beaten. Linear time for each
factor. Limits: errors of different columns are taken as independent.

Paper: Banner, Nahshan and Soudry 2019 (arXiv:1810.05723, section 3) minimise this error under a model of the weights;
here it is the error of the weights themselves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.formats import Format
from runtime.quantization import QuantizedWeight
from runtime.quantizers.grid import Grid, range_of, span_grid
from runtime.quantizers.input_statistics import InputStatistics, require_statistics

# From the whole range to three tenths of it: the least error of 64 normal weights lies at half of it with 2 bits.
SHRINK_FACTORS = tuple(1.0 - 0.025 * step for step in range(29))


def quantize_clipping(
    weight: Tensor,
    format_: Format,
    statistics: InputStatistics | None = None,
    *,
    factors: Sequence[float] = SHRINK_FACTORS,
) -> QuantizedWeight:
    """Returns the weight rounded to the nearest codes of clipped ranges.

    Args:
        weight: [out_features, in_features], finite.
        format_: An integer format whose group size divides in_features.
        statistics: Of the weight's inputs; None to count all columns alike.
        factors: Of the range, each in (0, 1].

    Raises:
        ValueError: If the group size does not divide the row, a scale is not a finite float16, a factor is out of
            range, or the statistics are of another input.
    """
    importance = None
    if statistics is not None:
        statistics.check_fits(weight)
        importance = statistics.hessian().diagonal()
    grid = find_clipped_grid(weight, format_, importance, factors=factors)
    return grid.quantized(grid.codes_of(weight))


def quantize_weighted_clipping(
    weight: Tensor, format_: Format, statistics: InputStatistics | None = None
) -> QuantizedWeight:
    """Returns the weight clipped for the inputs that its columns get; arguments as of ``quantize_clipping``.

    Raises:
        ValueError: If there are no statistics, or for the reasons of ``quantize_clipping``.
    """
    return quantize_clipping(weight, format_, require_statistics(statistics, weight, "weighted_clipping"))


def quantize_drawn_clipping(
    weight: Tensor, format_: Format, statistics: InputStatistics | None = None
) -> QuantizedWeight:
    """Returns what ``quantize_weighted_clipping`` does; its statistics are of drawn tokens (``runtime.drawn_tokens``).

    Raises:
        ValueError: If there are no statistics, or for the reasons of ``quantize_clipping``.
    """
    return quantize_clipping(weight, format_, require_statistics(statistics, weight, "drawn_clipping"))


def find_clipped_grid(
    weight: Tensor, format_: Format, importance: Tensor | None, *, factors: Sequence[float] = SHRINK_FACTORS
) -> Grid:
    """Returns the grid of the best factor of each group.

    Args:
        weight: [out_features, in_features], finite.
        format_: An integer format whose group size divides in_features.
        importance: [in_features], h; None for ones.
        factors: Of the range, each in (0, 1].

    Raises:
        ValueError: If the group size does not divide the row, a scale is not a finite float16, or a factor is out of
            range.
    """
    if not factors or not all(0.0 < factor <= 1.0 for factor in factors):
        msg = f"factors must be numbers above 0, at most 1: got {list(factors)}. Use SHRINK_FACTORS."
        raise ValueError(msg)
    low, high = range_of(weight, format_)
    best: Grid | None = None
    least = torch.zeros_like(low)
    for factor in factors:
        grid = span_grid(low * factor, high * factor, format_)
        squares = grid.values_of(grid.codes_of(weight)).sub_(weight).square_()
        error = (squares if importance is None else squares.mul_(importance)).view(*low.shape, -1).sum(-1)
        best, least = (grid, error) if best is None else _choose_by_group(best, grid, least, error)
    assert best is not None
    return best


def _choose_by_group(best: Grid, grid: Grid, least: Tensor, error: Tensor) -> tuple[Grid, Tensor]:
    better = error < least
    chosen = Grid(
        format=grid.format,
        scale=torch.where(better, grid.scale, best.scale),
        zero_point=torch.where(better, grid.zero_point, best.zero_point),
    )
    return chosen, torch.where(better, error, least)
