"""Learned rounding: rounding offsets and range clips found by signed gradients of the output error.

    minimise over V, a, b:   tr(D H D'),   rendered = s (clamp(round(W / s + V) + z, 0, 2^b - 1) - z),
    s = (b high - a low) / (2^b - 1),   z = round(-a low / s),   V in [-1/2, 1/2],   a, b in (0, 1],

low and high the ends of each group's clipped grid. Rounding passes gradients straight through. Only the sign of a
gradient is used, with a step that falls linearly to zero and sums to 1/2: no offset can cross more than one code, and
what is learned is whether to round up or down. H is all that is known of the inputs, so a step sees the whole
calibration set and nothing is drawn at random. Every row keeps the best of its iterates, the clipped rounding included.

Complexity: rows * in^2 for each step and two dozen passes over the weight. Limits: a local search near the nearest
codes; it moves many weights at once, where coordinate descent moves one.

Papers: Nagel et al. 2020 (AdaRound, arXiv:2004.10568: rounding on the layer's output error); Hubara et
al. 2020 (AdaQuant, arXiv:2006.10518: grids as well); Cheng et al. 2023 (SignRound, arXiv:2309.05516: signed
gradients, offsets within half a step and clips). They see samples of the inputs; the clips here start from
``clipping``.
"""

from typing import Any

import torch
from torch import Tensor

from runtime.formats import Format
from runtime.quantization import QuantizedWeight
from runtime.quantizers.clipping import find_clipped_grid
from runtime.quantizers.grid import Grid, by_row_blocks, largest_code, round_scale
from runtime.quantizers.input_statistics import InputStatistics, require_statistics

_LEAST_CLIP = 0.1


def quantize_learned_rounding(
    weight: Tensor, format_: Format, statistics: InputStatistics | None = None, *, steps: int = 100
) -> QuantizedWeight:
    """Returns the weight with learned roundings and clips.

    Args:
        weight: [out_features, in_features], finite.
        format_: An integer format whose group size divides in_features.
        statistics: Of the weight's inputs.
        steps: Gradient steps; not negative.

    Raises:
        ValueError: If there are no statistics or they are of another input, ``steps`` is negative, the group size does
            not divide the row, or a scale is not a finite float16.
    """
    statistics = require_statistics(statistics, weight, "learned_rounding")
    if steps < 0:
        msg = f"steps must not be negative: got steps={steps}. Use a number such as 100."
        raise ValueError(msg)
    H = statistics.hessian()
    importance = H.diagonal()
    return by_row_blocks(weight, lambda rows: _learn(rows, find_clipped_grid(rows, format_, importance), H, steps))


def _learn(weight: Tensor, start: Grid, H: Tensor, steps: int) -> QuantizedWeight:
    variables = _Variables(weight, start)
    best = _Best(start, start.codes_of(weight), weight, H)
    for step in range(steps):
        grid, codes, rendered = variables.render()
        # The gradient of tr(D H D') with respect to the rendered weight is 2 D H; its sign is all that counts.
        difference = rendered.detach() - weight
        gradient = difference @ H
        best.keep(grid, codes, (difference * gradient).sum(1))
        variables.move(rendered, gradient, size=(1.0 - step / steps) / (steps + 1))
    grid, codes, rendered = variables.render()
    difference = rendered.detach() - weight
    best.keep(grid, codes, ((difference @ H) * difference).sum(1))
    return best.result()


class _Variables:
    """Offsets and clips of a block of rows, and the weight that they render.

    Args:
        weight: [rows, in_features] float32.
        start: The grids whose ends the clips move.
    """

    def __init__(self, weight: Tensor, start: Grid) -> None:
        self._weight, self._start = weight.detach(), start
        self._offset = torch.zeros_like(self._weight, requires_grad=True)
        self._clips = [torch.ones_like(start.zero_point, requires_grad=True) for _ in range(2)]

    @torch.enable_grad()
    def render(self) -> tuple[Grid, Tensor, Tensor]:
        """Returns grid, codes and the rendered weight [rows, in_features], which passes gradients on."""
        format_, top = self._start.format, largest_code(self._start.format)
        first, zero_point = self._start.scale.to(torch.float32), self._start.zero_point
        if format_.symmetric:
            wanted = first * self._clips[1]
        else:
            low = zero_point * first * self._clips[0]
            wanted = (low + (top - zero_point) * first * self._clips[1]) / top
            zero_point = _straight_through(low / wanted, torch.round(low / wanted).clamp(0, top))
        scale = _straight_through(wanted, round_scale(wanted.detach(), format_)).unsqueeze(-1)
        position = self._weight.view(*first.shape, -1) / scale + self._offset.view(*first.shape, -1)
        codes = (_straight_through(position, torch.round(position)) + zero_point.unsqueeze(-1)).clamp(0, top)
        rendered = ((codes - zero_point.unsqueeze(-1)) * scale).view(self._weight.shape)
        stored = scale.detach().squeeze(-1).to(torch.float16)
        grid = Grid(format=format_, scale=stored, zero_point=zero_point.detach())
        return grid, codes.detach().view(self._weight.shape), rendered

    def move(self, rendered: Tensor, gradient: Tensor, *, size: float) -> None:
        """Moves every variable against the sign of its gradient, given that of the rendered weight."""
        variables = [self._offset, *self._clips]
        # A symmetric grid has one clip.
        slopes = torch.autograd.grad(rendered, variables, gradient, allow_unused=True)
        for variable, slope in zip(variables, slopes, strict=True):
            if slope is not None:
                variable.data.sub_(slope.sign_(), alpha=size)
        for clip in self._clips:
            clip.data.clamp_(_LEAST_CLIP, 1.0)


def _straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """Returns ``rounded`` with the gradient of ``value``."""
    # Not value + (rounded - value): that would round once more.
    passed: Tensor = _StraightThrough.apply(value, rounded)  # type: ignore[no-untyped-call]  # untyped in torch
    return passed


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.detach().to(value.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Best:
    """The best storable iterate of every row."""

    def __init__(self, grid: Grid, codes: Tensor, weight: Tensor, H: Tensor) -> None:
        difference = grid.values_of(codes) - weight
        self._grid, self._codes = grid, codes
        self._least = ((difference @ H) * difference).sum(1)

    def keep(self, grid: Grid, codes: Tensor, error: Tensor) -> None:
        better = (error < self._least).unsqueeze(1)
        self._least = torch.where(better[:, 0], error, self._least)
        self._codes = torch.where(better, codes, self._codes)
        self._grid = Grid(
            format=grid.format,
            scale=torch.where(better, grid.scale, self._grid.scale),
            zero_point=torch.where(better, grid.zero_point, self._grid.zero_point),
        )

    def result(self) -> QuantizedWeight:
        return self._grid.quantized(self._codes)
