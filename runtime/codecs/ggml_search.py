"""Search for the scales of llama.cpp's blocks: the least weighted squared error that a few sweeps find.

    minimise over d, dmin, scales, mins, codes:   sum_j h_j (w_j - value_j)^2        (the value of ``ggml_layouts``)

1. Each part alone, with real scales: ranges clipped by several factors; for the codes of each the scale (and minimum)
   of least squares, in closed form; the best is kept.
2. d and dmin put the largest scale and minimum of the parts at their largest integer, the others are rounded.
3. Sweeps: every part's scale and minimum is moved by one where that lowers its error with the codes rounded anew;
   then d and dmin are fitted to the integers by least squares. The best state met is kept.

The plain rule (no clipping, no fit) is among the starts, so its error is never exceeded. Linear time. Parts of a block
meet only through d and dmin.

The search of llama.cpp (``make_qx_quants``, ``make_qkx2_quants``) has the first two steps; without importance it
weights squares by w^2 or by |w| plus a constant, this one by one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from runtime.codecs.ggml_layouts import BlockLayout, Fields
from runtime.quantizers.grid import LARGEST_SCALE

# Of the range of a part; one is the plain rule.
_FACTORS = tuple(1.0 - 0.05 * step for step in range(9))
_FEW_FACTORS = (1.0, 0.98, 0.96)
# How far beyond the last code the largest weight is put; zero is the plain rule.
_OVERSHOOTS = tuple(0.15 * step for step in range(-5, 8))
_FINE_OVERSHOOTS = tuple(0.2 * step for step in range(-4, 9))
_SWEEPS = 2


@dataclass(frozen=True, eq=False)
class _State:
    """Integers and scales of blocks [N] with their codes and error."""

    fields: Fields
    error: Tensor


def search_blocks(x: Tensor, h: Tensor, layout: BlockLayout) -> Fields:
    """Returns the fields of least error found for blocks.

    Args:
        x: [N, parts, length] float32.
        h: Weights of the squares, positive, broadcast to x.
        layout: The block format.
    """
    h = h.expand_as(x)
    affine = layout.most_min > 0
    starts = _start_affine(x, h, layout) if affine else _start_symmetric(x, h, layout)
    best: _State | None = None
    for scale, least in starts:
        state = _evaluate(x, h, layout, *_quantize_scales(scale, least, layout))
        best = _better(best, state)
        for _ in range(_SWEEPS):
            if layout.scales is not None:
                state = _move_integers(x, h, layout, state.fields)
            state = _evaluate(x, h, layout, *_refit(x, h, layout, state.fields))
            best = _better(best, state)
    assert best is not None
    return best.fields


def part_steps(fields: Fields) -> tuple[Tensor, Tensor | None]:
    """Returns the float32 step and minimum [..., parts] of each part, rounded as they are when they are read."""
    step = fields.d.to(torch.float32).unsqueeze(-1) * fields.scales
    if fields.mins is None or fields.dmin is None:
        return step, None
    return step, fields.dmin.to(torch.float32).unsqueeze(-1) * fields.mins


def values_of(fields: Fields, layout: BlockLayout) -> Tensor:
    """Returns the float32 values [..., parts, length]."""
    step, least = part_steps(fields)
    values = layout.levels(fields.codes).mul_(step.unsqueeze(-1))
    return values if least is None else values.sub_(least.unsqueeze(-1))


def _start_symmetric(x: Tensor, h: Tensor, layout: BlockLayout) -> list[tuple[Tensor, Tensor | None]]:
    """Returns the plain and the best scales [N, parts] of the parts; a negative one turns the codes around."""
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    power = (h * x * x).sum(-1)
    # Eight bits are plainly used from -127 on.
    plain = extreme.squeeze(-1) / (-127 if layout.top == 255 else layout.ends[0])
    best, least = plain, torch.full_like(power, torch.inf)
    for end in _list_ends(layout):
        levels = layout.nearest(x, extreme / end)
        along, square = (h * x * levels).sum(-1), (h * levels * levels).sum(-1)
        error = power - along.square() / square
        better = (error < least) & (square > 0)
        best, least = torch.where(better, along / square, best), torch.where(better, error, least)
    return [(plain, None), (best, None)]


def _list_ends(layout: BlockLayout) -> list[float]:
    """Returns the levels, real numbers, to put the largest weight of a part at; a table has two different ends."""
    if not layout.table:
        return [layout.ends[0] - overshoot for overshoot in _OVERSHOOTS]
    (low, next_low), (next_high, high) = layout.table[:2], layout.table[-2:]
    below = [low - overshoot * (next_low - low) for overshoot in _OVERSHOOTS[::2]]
    return below + [high + overshoot * (high - next_high) for overshoot in _OVERSHOOTS[1::2]]


def _start_affine(x: Tensor, h: Tensor, layout: BlockLayout) -> list[tuple[Tensor, Tensor | None]]:
    """Returns the plain and the best scales and minima [N, parts] of the parts."""
    low, high = x.amin(-1), x.amax(-1)
    if layout.scales is not None:
        # A minimum is subtracted and not negative.
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    plain = ((high - low) / layout.top, -low)
    best, least = plain, torch.full_like(low, torch.inf)
    for step, minimum in _list_ranges(plain, layout):
        codes = _affine_codes(x, step, minimum, layout)
        fitted = fit_affine(x, h, codes, nonnegative=layout.scales is not None)
        error = (h * (codes * fitted[0].unsqueeze(-1) - fitted[1].unsqueeze(-1) - x).square_()).sum(-1)
        better = error < least
        best = (torch.where(better, fitted[0], best[0]), torch.where(better, fitted[1], best[1]))
        least = torch.where(better, error, least)
    return [plain, best]


def _list_ranges(plain: tuple[Tensor, Tensor], layout: BlockLayout) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields scales and minima [N, parts] to try, as they clip the range of each part."""
    scale, least = plain
    if layout.scales is not None:
        yield from ((scale * factor, least * factor) for factor in (_FACTORS if layout.top < 31 else _FEW_FACTORS))
        return
    for overshoot in _FINE_OVERSHOOTS:
        step = scale * (layout.top / (layout.top + overshoot))
        # From the lower end, from the upper end, and from both.
        yield from ((step, least - part * layout.top * (scale - step)) for part in (0.0, 0.5, 1.0))


def fit_affine(x: Tensor, h: Tensor, codes: Tensor, *, nonnegative: bool) -> tuple[Tensor, Tensor]:
    """Returns the scale and minimum of least weighted error of ``scale * codes - minimum`` along the last axis."""
    mass, first, second = h.sum(-1), (h * codes).sum(-1), (h * codes * codes).sum(-1)
    moment, along = (h * x).sum(-1), (h * x * codes).sum(-1)
    determinant = mass * second - first.square()
    regular = determinant > 1e-6 * mass * second
    scale = torch.where(regular, (mass * along - moment * first) / determinant, 0.0)
    minimum = torch.where(regular, (first * along - second * moment) / determinant, -moment / mass)
    if nonnegative:
        through_zero = (minimum < 0) | (scale < 0)
        only = torch.where(second > 0, along / second, 0.0).clamp_(min=0.0)
        scale, minimum = torch.where(through_zero, only, scale), torch.where(through_zero, 0.0, minimum)
    return scale, minimum


def _quantize_scales(
    scale: Tensor, least: Tensor | None, layout: BlockLayout
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns d, scales, dmin and mins for real scales and minima [N, parts]."""
    if layout.scales is None:
        ones = torch.ones_like(scale, dtype=torch.int32)
        return (
            _half(scale[..., 0]),
            ones,
            None if least is None else _half(least[..., 0]),
            None if least is None else ones,
        )
    low, top = layout.scale_range
    extreme = scale.gather(-1, scale.abs().argmax(-1, keepdim=True)).squeeze(-1)
    d = _half(extreme / (low if low < 0 else top))
    integers = _divide(scale, d).round_().clamp_(low, top).to(torch.int32)
    if least is None:
        return d, integers, None, None
    dmin = _half(least.amax(-1) / layout.most_min)
    return d, integers, dmin, _divide(least, dmin).round_().clamp_(0, layout.most_min).to(torch.int32)


def _evaluate(
    x: Tensor, h: Tensor, layout: BlockLayout, d: Tensor, scales: Tensor, dmin: Tensor | None, mins: Tensor | None
) -> _State:
    """Returns the state with the nearest codes for these scales."""
    fields = Fields(torch.empty(0), scales, mins, d, dmin)
    step, least = part_steps(fields)
    shifted = x if least is None else x + least.unsqueeze(-1)
    codes = layout.codes(layout.nearest(shifted, step.unsqueeze(-1)))
    fields = Fields(codes, scales, mins, d, dmin)
    return _State(fields, (h * (values_of(fields, layout) - x).square_()).sum((-1, -2)))


def _move_integers(x: Tensor, h: Tensor, layout: BlockLayout, fields: Fields) -> _State:
    """Returns the state with each part's scale and minimum moved by one where that is better."""
    low, top = layout.scale_range
    best_error: Tensor | None = None
    scales, mins = fields.scales, fields.mins
    moves = product((0, -1, 1), (0, -1, 1) if fields.mins is not None else (0,))
    for scale_move, min_move in moves:
        moved = (fields.scales + scale_move).clamp(low, top)
        moved_min = None if fields.mins is None else (fields.mins + min_move).clamp(0, layout.most_min)
        step, least = part_steps(Fields(fields.codes, moved, moved_min, fields.d, fields.dmin))
        shifted = x if least is None else x + least.unsqueeze(-1)
        rest = layout.nearest(shifted, step.unsqueeze(-1)).mul_(step.unsqueeze(-1)).sub_(shifted)
        error = (h * rest.square_()).sum(-1)
        better = torch.ones_like(error, dtype=torch.bool) if best_error is None else error < best_error
        best_error = error if best_error is None else torch.where(better, error, best_error)
        scales = torch.where(better, moved, scales)
        if moved_min is not None and mins is not None:
            mins = torch.where(better, moved_min, mins)
    return _evaluate(x, h, layout, fields.d, scales, fields.dmin, mins)


def _refit(
    x: Tensor, h: Tensor, layout: BlockLayout, fields: Fields
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns d and dmin of least error for the integers, which stay."""
    levels = layout.levels(fields.codes).mul_(fields.scales.unsqueeze(-1))
    if fields.mins is None:
        square = (h * levels * levels).sum((-1, -2))
        fitted = torch.where(square > 0, (h * x * levels).sum((-1, -2)) / square, 0.0)
        return _half(fitted), fields.scales, None, None
    offsets = fields.mins.to(torch.float32).unsqueeze(-1).expand_as(levels)
    aa, bb, ab = ((h * a * b).sum((-1, -2)) for a, b in ((levels, levels), (offsets, offsets), (levels, offsets)))
    xa, xb = (h * x * levels).sum((-1, -2)), (h * x * offsets).sum((-1, -2))
    determinant = aa * bb - ab * ab
    regular = determinant > 1e-6 * aa * bb
    d = torch.where(regular, (xa * bb - xb * ab) / determinant, fields.d.to(torch.float32))
    dmin = torch.where(regular, (xa * ab - xb * aa) / determinant, 0.0 if fields.dmin is None else fields.dmin.float())
    return _half(d), fields.scales, _half(dmin), fields.mins


def _affine_codes(x: Tensor, step: Tensor, minimum: Tensor, layout: BlockLayout) -> Tensor:
    return layout.nearest(x + minimum.unsqueeze(-1), step.unsqueeze(-1))


def _divide(numbers: Tensor, unit: Tensor) -> Tensor:
    wide = unit.to(torch.float32).unsqueeze(-1)
    return torch.where(wide == 0, 0.0, numbers / wide)


def _half(numbers: Tensor) -> Tensor:
    return numbers.clamp(-LARGEST_SCALE, LARGEST_SCALE).to(torch.float16)


def _better(first: _State | None, second: _State) -> _State:
    """Returns of each block the state with the smaller error."""
    if first is None:
        return second
    better = second.error < first.error

    def choose(new: Tensor | None, old: Tensor | None) -> Tensor | None:
        if new is None or old is None:
            return None
        return torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old)

    a, b = first.fields, second.fields
    codes, scales, d = choose(b.codes, a.codes), choose(b.scales, a.scales), choose(b.d, a.d)
    assert codes is not None and scales is not None and d is not None
    fields = Fields(codes, scales, choose(b.mins, a.mins), d, choose(b.dmin, a.dmin))
    return _State(fields, torch.where(better, second.error, first.error))
