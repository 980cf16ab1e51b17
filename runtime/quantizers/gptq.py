"""GPTQ: columns are rounded one after another, each after it has been moved to make up for the errors before it.

Problem: min tr(D H D') over codes, D = rendered - weight, H from the inputs (``input_statistics``). With the factor
H = R R', R upper triangular, the output error of a row d of D is a sum of squares, one for each column,

    d H d' = sum_k R_kk^2 (d_k + sum_{i<k} d_i R_ik / R_kk)^2,

and column k, when its turn comes, is rounded from the value that makes its own square zero:

    q_k = round(w_k - sum_{i<k} d_i R_ik / R_kk).

This is what GPTQ does with the Cholesky factor U of H^-1: R = U^-1, and nothing need be inverted. Columns with large
H_kk go first (activation order), while most are left to make up for them; the grids are then found beforehand
(clipped, see ``clipping``). Without it a group's grid can be found when its first column is reached, from the weights
as they have been moved until then.

Complexity: in^3 / 3 for the factor, rows * in^2 / 2 for the rest, in blocks of columns; float32, the factor in float64
where float32 fails. Limits: greedy; weights that later columns cannot make up for are paid in full.

Paper: Frantar, Ashkboos, Hoefler and Alistarh 2022 (arXiv:2210.17323, algorithm 1).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from runtime.formats import Format
from runtime.quantization import QuantizedWeight
from runtime.quantizers.clipping import find_clipped_grid
from runtime.quantizers.grid import Grid, by_row_blocks, find_grid, largest_code
from runtime.quantizers.input_statistics import InputStatistics, require_statistics

_BLOCK_COLUMNS = 64
# Of the mean of the diagonal, tried in turn: a matrix of less than full rank needs a little.
_MORE_DAMPING = (0.0, 1e-6, 1e-4, 1e-2)

# (column, numbers [rows]) -> the nearest codes and their values, both [rows] and new tensors
RoundColumn = Callable[[int, Tensor], tuple[Tensor, Tensor]]
# (block of columns, these columns [block, rows] as moved so far) -> how each column of the block is rounded
_RoundingOfBlock = Callable[[slice, Tensor], RoundColumn]


def quantize_gptq(
    weight: Tensor,
    format_: Format,
    statistics: InputStatistics | None = None,
    *,
    activation_order: bool = True,
    clip: bool = True,
) -> QuantizedWeight:
    """Returns the weight quantized column by column.

    Args:
        weight: [out_features, in_features], finite.
        format_: An integer format whose group size divides in_features.
        statistics: Of the weight's inputs.
        activation_order: Columns of large inputs first, on grids found beforehand; else from the first to the last,
            on grids found group by group.
        clip: Clipped grids; else each spans the range of its group.

    Raises:
        ValueError: If there are no statistics or they are of another input, the second moment is not positive
            semidefinite, the group size does not divide the row, or a scale is not a finite float16.
    """
    statistics = require_statistics(statistics, weight, "gptq")
    groups = format_.group_count(weight.shape[1])
    H = statistics.hessian()
    if not activation_order:
        factor = normalised_factor(H)
        return by_row_blocks(weight, lambda rows: _round_groups(rows, format_, groups, factor, H.diagonal(), clip))
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    factor = normalised_factor(H[order][:, order])

    def round_rows(rows: Tensor) -> QuantizedWeight:
        return _round_ordered(rows, _find_grid(rows, format_, H.diagonal(), clip), factor, order)

    return by_row_blocks(weight, round_rows)


def normalised_factor(H: Tensor) -> Tensor:
    """Returns R with its columns divided by its diagonal, where H = R R' with R upper triangular.

    Args:
        H: [in_features, in_features] float32, symmetric, positive semidefinite, with a positive diagonal.

    Raises:
        ValueError: If H is not positive semidefinite.
    """
    mean, reversed_ = H.diagonal().mean(), H.flip(0, 1)
    for damping in _MORE_DAMPING:
        reversed_.diagonal().add_(damping * mean)
        for dtype in (torch.float32, torch.float64):
            factor, failed = torch.linalg.cholesky_ex(reversed_.to(dtype))
            if not bool(failed):
                R: Tensor = factor.flip(0, 1)
                return R.div_(R.diagonal().clone()).to(torch.float32)
    msg = (
        f"second_moment must be positive semidefinite: got one with an eigenvalue below -{_MORE_DAMPING[-1]} times the "
        f"mean of its diagonal, in_features={len(H)}. Sum x x' over the inputs."
    )
    raise ValueError(msg)


def _find_grid(weight: Tensor, format_: Format, importance: Tensor, clip: bool) -> Grid:
    return find_clipped_grid(weight, format_, importance) if clip else find_grid(weight, format_)


def _round_ordered(weight: Tensor, grid: Grid, factor: Tensor, order: Tensor) -> QuantizedWeight:
    """Rounds the columns of rows in an order, on grids found before."""
    group_of = order // (weight.shape[1] // grid.scale.shape[1])
    scale, zero_point = grid.scale.T.to(torch.float32).contiguous(), grid.zero_point.T.contiguous()

    def rounding_of_block(block: slice, moved: Tensor) -> RoundColumn:
        return _on_integers(scale[group_of[block]], zero_point[group_of[block]], largest_code(grid.format))

    codes = _round_columns(weight.T[order], factor, _BLOCK_COLUMNS, rounding_of_block)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return grid.quantized(restored.T.contiguous())


def _round_groups(
    weight: Tensor, format_: Format, groups: int, factor: Tensor, importance: Tensor, clip: bool
) -> QuantizedWeight:
    """Rounds the columns of rows from the first to the last, the grid of a group found when it is reached."""
    columns = weight.T.contiguous()
    whole_row = replace(format_, group_size=None)
    found: list[Grid] = []

    def rounding_of_block(block: slice, moved: Tensor) -> RoundColumn:
        # What the columns of the group would be, were none of them rounded.
        by_earlier, own = moved - columns[block], factor[block, block].T
        unrounded = columns[block] + torch.linalg.solve_triangular(own, by_earlier, upper=False, unitriangular=True)
        grid = _find_grid(unrounded.T, whole_row, importance[block], clip)
        found.append(grid)
        scale, zero_point = grid.scale.T.to(torch.float32), grid.zero_point.T
        return _on_integers(scale.expand_as(moved), zero_point.expand_as(moved), largest_code(format_))

    codes = _round_columns(columns, factor, len(columns) // groups, rounding_of_block)
    scale = torch.cat([grid.scale for grid in found], dim=1)
    zero_point = torch.cat([grid.zero_point for grid in found], dim=1)
    return Grid(format=format_, scale=scale, zero_point=zero_point).quantized(codes.T.contiguous())


def round_compensated(weight: Tensor, statistics: InputStatistics, round_column: RoundColumn) -> Tensor:
    """Returns the codes [out_features, in_features] uint8 of a weight rounded column by column on any grid.

    Args:
        weight: [out_features, in_features] float32, finite.
        statistics: Of the weight's inputs.
        round_column: (column, numbers [out_features]) -> the nearest codes and their values; columns of large inputs
            are asked for first.

    Raises:
        ValueError: If the second moment is not positive semidefinite.
    """
    H = statistics.hessian()
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    columns = order.tolist()

    def rounding_of_block(block: slice, moved: Tensor) -> RoundColumn:
        return lambda k, numbers: round_column(columns[block.start + k], numbers)

    codes = _round_columns(weight.T[order], normalised_factor(H[order][:, order]), _BLOCK_COLUMNS, rounding_of_block)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored.T.contiguous()


def _on_integers(scale: Tensor, zero_point: Tensor, top: int) -> RoundColumn:
    """Returns the rounding of a block of columns on integer grids [block, rows]."""

    def round_column(k: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        code = torch.round(numbers / scale[k]).add_(zero_point[k]).clamp_(0, top)
        return code, (code - zero_point[k]).mul_(scale[k])

    return round_column


def _round_columns(columns: Tensor, factor: Tensor, block_columns: int, rounding_of_block: _RoundingOfBlock) -> Tensor:
    """Returns the codes [in_features, rows] uint8 of columns [in_features, rows] rounded in turn."""
    error, codes = torch.empty_like(columns), torch.empty_like(columns, dtype=torch.uint8)
    for start in range(0, len(columns), block_columns):
        block = slice(start, start + block_columns)
        moved = columns[block] - factor[:start, block].T @ error[:start]
        own = factor[block, block]
        round_column = rounding_of_block(block, moved)
        for k, j in enumerate(range(start, start + len(moved))):
            codes[j], value = round_column(k, moved[k])
            error[j] = value.sub_(columns[j])
            moved[k + 1 :].addr_(own[k, k + 1 :], error[j], alpha=-1)
    return codes
