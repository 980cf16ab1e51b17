"""Prices coarser units from one measurement of finer ones: experts whole or as a stack, weights that an engine fuses.

The error of a unit that is made of others is theirs side by side, so in the model without cross terms losses add:

    loss[m, f] = sum of loss[u, f] over the units u inside m,

and the sketches of a linear estimator add exactly (<g, D_1 + D_2> = <g, D_1> + <g, D_2>): the loss of summed sketches
holds the cross terms among the members as well. Standard errors add as those of independent samples do; where one text
measured all units they are dependent, and the sketch of the sum, where there is one, tells how much.

Complexity: O(U F). Limits: the difference between the sum and what the coarse unit really costs is the members'
interaction; it is not in the losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.candidates import Candidates, refuse_by_engine
from runtime.engine_rules import Engine
from runtime.units import EXPERT_GRANULARITIES, Unit, merge_units


@dataclass(frozen=True, kw_only=True, eq=False)
class MergedUnits:
    """Coarser candidates, and which of them each finer unit is part of.

    Args:
        candidates: M units, the same formats; a pair is allowed where all members allow it.
        member_of: [U] int64, index of the coarser unit of each finer one.
    """

    candidates: Candidates
    member_of: NDArray[np.int64]

    def sum_table(self, table: NDArray[Any]) -> NDArray[Any]:
        """Returns the sum [..., M, F] of the members' entries [..., U, F]; zero where the pair is not allowed."""
        by_unit = np.moveaxis(table, -2, 0)
        merged = np.zeros((len(self.candidates.units), *by_unit.shape[1:]), dtype=table.dtype)
        np.add.at(merged, self.member_of, by_unit)
        return np.where(self.candidates.allowed, np.moveaxis(merged, 0, -2), table.dtype.type(0))

    def sum_losses(
        self, loss: NDArray[np.float64], std_error: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns the losses [M, F] of the coarser units and their standard errors, from those [U, F] of the finer."""
        return self.sum_table(loss), np.sqrt(self.sum_table(np.square(std_error)))


def merge_candidates(
    candidates: Candidates, experts: str = "projection", *, engine: Engine | None = None
) -> MergedUnits:
    """Returns coarser candidates: experts at another granularity, or under the rules of an engine.

    Args:
        candidates: Units and formats, such as those of a profile.
        experts: Name in ``EXPERT_GRANULARITIES``.
        engine: Engine whose fusions and granularity are added, and whose refusals are.

    Raises:
        ValueError: If the granularity is unknown, the members of a unit have no format in common, or the engine runs
            none of those that they have.
    """
    names = [weight.name for unit in candidates.units for weight in unit.weights]
    units = merge_units(candidates.units, experts=experts, fuse=engine.fusions(names) if engine else ())
    if engine is not None:
        units = merge_units(units, experts=engine.experts)
    of_weight = {weight.name: m for m, unit in enumerate(units) for weight in unit.weights}
    member_of = np.array([of_weight[unit.weights[0].name] for unit in candidates.units], dtype=np.int64)
    allowed = np.ones((len(units), len(candidates.formats)), dtype=bool)
    np.logical_and.at(allowed, member_of, candidates.allowed)
    for m in np.flatnonzero(~allowed.any(axis=1)).tolist():
        msg = (
            f"units that get one format must have an allowed format in common: got none for '{units[m].name}' at "
            f"granularity '{experts}'. Use a finer one, or change the pins."
        )
        raise ValueError(msg)
    reasons: dict[tuple[int, int], str] = {}
    for (u, f), reason in candidates.reasons.items():
        reasons.setdefault((int(member_of[u]), f), reason)
    merged = Candidates(units=units, formats=candidates.formats, allowed=allowed, reasons=reasons)
    if engine is not None:
        merged = refuse_by_engine(merged, engine)
    return MergedUnits(candidates=merged, member_of=member_of)


def list_granularities(units: Sequence[Unit]) -> tuple[str, ...]:
    """Returns the names in ``EXPERT_GRANULARITIES`` that give different units, finest first, from these units on."""
    found: dict[tuple[Unit, ...], str] = {}
    for name in EXPERT_GRANULARITIES:
        found.setdefault(merge_units(units, experts=name), name)
    return tuple(found.values())
