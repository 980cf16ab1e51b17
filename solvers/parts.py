"""Parts of a problem under several limits: some units fixed, the others open, and the dual of what is left.

Fixing a unit to each of its formats in turn parts the choices. The unit that the relaxation divides and whose formats
differ most, by their priced use, is the one whose rounding costs most; fixing it raises the bounds most.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from solvers.dual import DualPoint, maximise_dual
from solvers.multi_core import measure_changes
from solvers.problem import BoolArray, FloatArray, IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A part of the problem: the units left open, their tables, what the others leave of the limits, and the dual.

    Args:
        units: units left open, [V].
        loss: inf where closed, [V, F].
        cost: [R, V, F].
        limit: what the fixed units leave, [R].
        fixed_loss: loss of the fixed units.
        choice: formats of the fixed units (anything for the others), [U].
        dual: best prices of this part.
        bound: no choice of this part loses less.
    """

    units: IntArray
    loss: FloatArray
    cost: FloatArray
    limit: FloatArray
    fixed_loss: float
    choice: IntArray
    dual: DualPoint
    bound: float


def relax_part(
    units: IntArray,
    loss: FloatArray,
    cost: FloatArray,
    limit: FloatArray,
    fixed_loss: float,
    choice: IntArray,
    near: FloatArray | None,
) -> Part:
    """Returns a part with its dual, of prices sought from everywhere or near given ones [R]."""
    dual = maximise_dual(loss, cost, limit, near=near)
    return Part(
        units=units,
        loss=loss,
        cost=cost,
        limit=limit,
        fixed_loss=fixed_loss,
        choice=choice,
        dual=dual,
        bound=math.inf if dual.proves_infeasible else fixed_loss + dual.bound,
    )


def keep_candidates(part: Part, kept: BoolArray, bound: float) -> Part:
    """Returns the part with the kept candidates [V, F] alone; units with a single one are fixed."""
    is_open = kept.sum(axis=1) > 1
    fixed = np.flatnonzero(~is_open)
    taken = part.dual.choice[fixed]
    choice = part.choice.copy()
    choice[part.units[fixed]] = taken
    return Part(
        units=part.units[is_open],
        loss=np.where(kept, part.loss, np.inf)[is_open],
        cost=part.cost[:, is_open],
        limit=part.limit - part.cost[:, fixed, taken].sum(axis=1),
        fixed_loss=part.fixed_loss + float(part.loss[fixed, taken].sum()),
        choice=choice,
        dual=replace(part.dual, choice=part.dual.choice[is_open], mixture=part.dual.mixture[:, is_open]),
        bound=bound,
    )


def list_branches(part: Part) -> Iterator[Part]:
    """Yields one part per format of the unit to branch on, which the part must have."""
    unit = _find_branching_unit(part)
    rest = np.arange(part.units.size) != unit
    for chosen in np.flatnonzero(np.isfinite(part.loss[unit])):
        choice = part.choice.copy()
        choice[part.units[unit]] = chosen
        branch = relax_part(
            part.units[rest],
            part.loss[rest],
            part.cost[:, rest],
            part.limit - part.cost[:, unit, chosen],
            part.fixed_loss + float(part.loss[unit, chosen]),
            choice,
            part.dual.price,
        )
        yield replace(branch, bound=max(branch.bound, part.bound))


def _find_branching_unit(part: Part) -> int:
    divided = (part.dual.mixture != part.dual.mixture[0]).any(axis=0)
    _, size = measure_changes(part.loss, part.cost, part.dual.price, part.dual.choice)
    largest = np.where(np.isfinite(part.loss), size, 0.0).max(axis=1)
    return int(np.where(divided, largest, -1.0).argmax() if divided.any() else largest.argmax())
