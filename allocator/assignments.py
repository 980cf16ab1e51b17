"""Assignments: one format index a unit, from a solver or a uniform rule, with its use and predicted loss."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.candidates import Candidates
from runtime.costs import CostTable
from runtime.units import count_weights
from sensitivity.profile import SensitivityProfile
from solvers import SolveResult


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignment:
    """A choice for every unit.

    Args:
        name: Shown to people.
        kind: ``plan`` or ``uniform``.
        metric: Metric that predicts its loss.
        choice: [U] int64 format indices.
        result: The solver's result, or None for a uniform rule.
    """

    name: str
    kind: str
    metric: str
    choice: NDArray[np.int64]
    result: SolveResult | None = None

    def formats_by_weight(self, candidates: Candidates) -> dict[str, str]:
        """Returns weight name -> format name."""
        return {
            weight.name: candidates.formats[int(f)].name
            for unit, f in zip(candidates.units, self.choice, strict=True)
            for weight in unit.weights
        }


def pick(table: NDArray[np.float64], choice: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the chosen entries [U] of a table [U, F]."""
    return np.asarray(table[np.arange(len(choice)), choice], dtype=np.float64)


def use_of(choice: NDArray[np.int64], tables: Mapping[str, CostTable]) -> dict[str, float]:
    """Returns resource -> use of the whole model."""
    return {name: float(pick(table.cost, choice).sum() + table.fixed) for name, table in tables.items()}


def bits_per_weight(profile: SensitivityProfile, memory_bytes: float) -> float:
    """Returns the stored bits of the units per weight, for a whole model of ``memory_bytes``."""
    return 8.0 * (memory_bytes - profile.fixed_bytes) / count_weights(profile.candidates.units)


def list_uniform(candidates: Candidates, metric: str) -> list[Assignment]:
    """Returns the uniform assignments: one for each format, and each again with 8-bit embeddings and heads.

    Where a unit may not take the format it takes its smallest wider one (else its widest), so that every format gives
    an assignment; the variant with 8-bit embeddings is what most engines do by default.

    Args:
        candidates: Units and formats.
        metric: Metric that will predict their losses.
    """
    embeddings = [u for u, unit in enumerate(candidates.units) if unit.kind in ("embedding", "head")]
    found: dict[bytes, Assignment] = {}
    for format_ in candidates.formats:
        choice = np.array([_nearest(candidates, u, format_.bits, format_.name) for u in range(len(candidates.units))])
        variants = {f"uniform {format_.name}": choice}
        if embeddings and format_.bits < 8:
            wider = choice.copy()
            wider[embeddings] = [_nearest(candidates, u, 8, None) for u in embeddings]
            variants[f"uniform {format_.name}, 8-bit embeddings"] = wider
        for name, variant in variants.items():
            assignment = Assignment(name=name, kind="uniform", metric=metric, choice=variant.astype(np.int64))
            found.setdefault(assignment.choice.tobytes(), assignment)
    return list(found.values())


def _nearest(candidates: Candidates, u: int, bits: int, name: str | None) -> int:
    allowed = [int(f) for f in np.flatnonzero(candidates.allowed[u])]
    by_name = [f for f in allowed if candidates.formats[f].name == name]
    wider = [f for f in allowed if candidates.formats[f].bits >= bits]
    if by_name:
        return by_name[0]
    shape = candidates.units[u].weights[0].shape
    if wider:
        return min(wider, key=lambda f: candidates.formats[f].storage_bytes(shape))
    return max(allowed, key=lambda f: candidates.formats[f].storage_bytes(shape))
