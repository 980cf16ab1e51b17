"""Coordinate descent on the output error: one code or scale at a time, each at its exact best.

Problem: min tr(D H D'), D = rendered - weight, H from the inputs (``input_statistics``). It is a sum over rows and,
with all else fixed, a parabola in each weight, so the best code of weight j of a row is the one nearest to

    u_j = value_j - (D H)_j / H_jj,

the scale s of a group with c = codes - zero_point and gradient g = (D H) of the group is best at the float16 next to
s - <c, g> / (c' H c). No step raises the error. Zero points stay: where every code is at its best, moving a whole group
by a step did not help one group of the layers tried. Columns are visited in turn, sweep after sweep, from the codes of
GPTQ, until nothing changes.

A relaxed sweep sets every weight to u_j without rounding, which leaves the valley of the present codes; the next sweep
rounds. After relaxed sweeps rows keep their best codes so far.

Complexity: rows * in^2 for each sweep over the codes and as much over the scales, in blocks of columns; float32, the
gradient of each block made anew so that roundings do not add up. Limits: ends where no single change helps.

Paper: Behdin et al. 2023 (QuantEase, arXiv:2309.01885), with every third sweep relaxed. There scales stay as they are
found. Its sparse outliers need a format that stores them and are not here.
"""

import torch
from torch import Tensor

from runtime.formats import Format
from runtime.quantization import QuantizedWeight
from runtime.quantizers.gptq import quantize_gptq
from runtime.quantizers.grid import Grid, by_row_blocks, grid_of, largest_code, round_scale
from runtime.quantizers.input_statistics import InputStatistics, require_statistics
from runtime.quantizers.rtn import quantize_rtn

_BLOCK_COLUMNS = 64
STARTS = ("gptq", "rtn")


def quantize_coordinate_descent(
    weight: Tensor,
    format_: Format,
    statistics: InputStatistics | None = None,
    *,
    start: str = "gptq",
    sweeps: int = 9,
    relaxed_every: int | None = 3,
    refit_scales: bool = True,
) -> QuantizedWeight:
    """Returns the weight with codes and grids that no single change improves, or those after the last sweep.

    Args:
        weight: [out_features, in_features], finite.
        format_: An integer format whose group size divides in_features.
        statistics: Of the weight's inputs.
        start: Name in ``STARTS`` of the quantizer whose result is improved.
        sweeps: Most sweeps over all weights; at least 1.
        relaxed_every: Every how many sweeps one is relaxed, never the last; at least 2, or None for no such sweep.
        refit_scales: Scales are improved after each rounded sweep; else they stay.

    Raises:
        ValueError: If there are no statistics or they are of another input, an argument is out of range, the group
            size does not divide the row, or a scale is not a finite float16.
    """
    statistics = require_statistics(statistics, weight, "coordinate_descent")
    if start not in STARTS or sweeps < 1 or (relaxed_every is not None and relaxed_every < 2):
        msg = (
            f"start must be one of {', '.join(STARTS)}, sweeps at least 1, relaxed_every at least 2: got "
            f"start='{start}', sweeps={sweeps}, relaxed_every={relaxed_every}. Correct them."
        )
        raise ValueError(msg)
    start_of = quantize_gptq if start == "gptq" else quantize_rtn
    H = statistics.hessian()

    def improve(rows: Tensor) -> QuantizedWeight:
        descent = _Descent(rows, start_of(rows, format_, statistics), H)
        for sweep in range(1, sweeps + 1):
            relaxed = relaxed_every is not None and sweep % relaxed_every == 0 and sweep < sweeps
            changed = descent.sweep(relaxed=relaxed)
            if refit_scales and not relaxed:
                changed = descent.refit_scales() or changed
            # Where rounded sweeps are at rest a relaxed one still moves, unless there is no error to lower.
            if not changed and (relaxed or relaxed_every is None):
                break
        return descent.result()

    return by_row_blocks(weight, improve)


class _Descent:
    """Codes, grids and errors of a block of rows while they change, transposed: columns are contiguous.

    Args:
        weight: [rows, in_features] float32.
        quantized: Where to start.
        H: [in_features, in_features] float32.
    """

    def __init__(self, weight: Tensor, quantized: QuantizedWeight, H: Tensor) -> None:
        grid = grid_of(quantized)
        self._format, self._H = quantized.format, H
        self._columns = weight.T.contiguous()
        self._codes = quantized.codes.T.to(torch.float32).contiguous()
        self._scale = grid.scale.T.to(torch.float32).contiguous()
        self._zero_point = grid.zero_point.T.contiguous()
        self._group_columns = len(self._columns) // len(self._scale)
        self._error = grid.values_of(quantized.codes).T - self._columns
        self._on_grid = True
        self._best, self._least = self._state(), self._output_error()

    def sweep(self, *, relaxed: bool) -> bool:
        """Sets every weight in turn to its best, rounded or not; returns whether one changed."""
        changed = False
        for start in range(0, len(self._columns), _BLOCK_COLUMNS):
            block = slice(start, start + _BLOCK_COLUMNS)
            gradient, own = self._H[block] @ self._error, self._H[block, block]
            for k, j in enumerate(range(start, start + len(own))):
                step = -gradient[k] / own[k, k] if relaxed else self._step(j, gradient[k], own[k, k])
                self._error[j] += step
                gradient[k + 1 :].addr_(own[k, k + 1 :], step)
                changed = changed or bool(step.any())
        self._on_grid = not relaxed
        self._keep_best()
        return changed

    def refit_scales(self) -> bool:
        """Sets every scale in turn to its best; returns whether one changed."""
        changed = False
        for g in range(len(self._scale)):
            block = slice(g * self._group_columns, (g + 1) * self._group_columns)
            direction = self._codes[block] - self._zero_point[g]
            slope = (direction * (self._H[block] @ self._error)).sum(0)
            curvature = (direction * (self._H[block, block] @ direction)).sum(0)
            scale = round_scale(self._scale[g] - slope / curvature, self._format).to(torch.float32)
            step = scale - self._scale[g]
            better = step * (2 * slope + step * curvature) < 0
            self._scale[g] = torch.where(better, scale, self._scale[g])
            self._error[block].addcmul_(direction, torch.where(better, step, 0.0))
            changed = changed or bool(better.any())
        self._keep_best()
        return changed

    def result(self) -> QuantizedWeight:
        """Returns the best of every row."""
        codes, scale = (part.T.contiguous() for part in self._best)
        zero_point = self._zero_point.T.contiguous()
        grid = Grid(format=self._format, scale=scale.to(torch.float16), zero_point=zero_point)
        return grid.quantized(codes)

    def _step(self, j: int, gradient: Tensor, curvature: Tensor) -> Tensor:
        g = j // self._group_columns
        value = self._error[j] + self._columns[j]
        code = torch.round((value - gradient / curvature) / self._scale[g]).add_(self._zero_point[g])
        code.clamp_(0, largest_code(self._format))
        if not self._on_grid:
            self._codes[j] = code
            return (code - self._zero_point[g]).mul_(self._scale[g]).sub_(value)
        step = (code - self._codes[j]).mul_(self._scale[g])
        # Steps between two codes as good as each other would never end.
        better = step * (2 * gradient + curvature * step) < 0
        self._codes[j] = torch.where(better, code, self._codes[j])
        return torch.where(better, step, 0.0)

    def _keep_best(self) -> None:
        if not self._on_grid:
            return
        error = self._output_error()
        better = error < self._least
        self._least = torch.where(better, error, self._least)
        self._best = tuple(torch.where(better, now, best) for now, best in zip(self._state(), self._best, strict=True))

    def _state(self) -> tuple[Tensor, ...]:
        return self._codes.clone(), self._scale.clone()

    def _output_error(self) -> Tensor:
        return ((self._H @ self._error) * self._error).sum(0)
