"""Assignments: one format index a unit, from a solver or a uniform rule, with its use and predicted loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.activation_names import activation_name
from runtime.cache_formats import TOKEN_BLOCKS, cache_bytes
from runtime.candidates import Candidates
from runtime.costs import CostTable
from runtime.units import count_weights
from sensitivity.profile import SensitivityProfile
from solvers import SolveResult

# Widths of a uniform cache that uniform weights are measured with.
CACHE_BITS = (8, 16)


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

    def formats_by_cache(self, candidates: Candidates) -> dict[str, str]:
        """Returns cache unit -> format name; empty where caches are not among the candidates."""
        return {
            unit.name: candidates.formats[int(f)].name
            for unit, f in zip(candidates.units, self.choice, strict=True)
            if unit.cache_shape is not None
        }

    def formats_by_activation(self, candidates: Candidates) -> dict[str, str]:
        """Returns input of a linear layer -> format name; empty where activations are not among the candidates."""
        return {
            activation_name(module): candidates.formats[int(f)].name
            for unit, f in zip(candidates.units, self.choice, strict=True)
            for module in unit.modules
        }

    def formats_by_name(self, candidates: Candidates) -> dict[str, str]:
        """Returns name of a weight, a cache unit or the input of a linear layer -> format name."""
        return {
            **self.formats_by_weight(candidates),
            **self.formats_by_cache(candidates),
            **self.formats_by_activation(candidates),
        }


def pick(table: NDArray[np.float64], choice: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the chosen entries [U] of a table [U, F]."""
    return np.asarray(table[np.arange(len(choice)), choice], dtype=np.float64)


def use_of(choice: NDArray[np.int64], tables: Mapping[str, CostTable]) -> dict[str, float]:
    """Returns resource -> use of the whole model."""
    return {name: table.use(choice) for name, table in tables.items()}


def cache_use(candidates: Candidates, choice: NDArray[np.int64], memory: CostTable) -> float:
    """Returns the bytes of the caches alone."""
    caches = np.array([unit.cache_shape is not None for unit in candidates.units])
    return float(pick(memory.cost, choice)[caches].sum())


def bits_per_weight(profile: SensitivityProfile, file_bytes: float) -> float:
    """Returns the stored bits of the units per weight, for a weight file of ``file_bytes``."""
    return 8.0 * (file_bytes - profile.fixed_bytes) / count_weights(profile.candidates.units)


def list_uniform(candidates: Candidates, metric: str) -> list[Assignment]:
    """Returns the uniform assignments: one for each format, and each again with 8-bit embeddings and heads.

    Where a unit may not take the format it takes its smallest wider one (else its widest), so that every format gives
    an assignment; the variant with 8-bit embeddings is what most engines do by default. Where caches are units there is
    each of these again with a cache of each width in ``CACHE_BITS``, which is what engines offer; where activations are
    units, with each of their formats for all.

    Args:
        candidates: Units and formats.
        metric: Metric that will predict their losses.
    """
    embeddings = [u for u, unit in enumerate(candidates.units) if unit.kind in ("embedding", "head")]
    caches = [u for u, unit in enumerate(candidates.units) if unit.cache_shape is not None]
    activations = [u for u, unit in enumerate(candidates.units) if unit.kind == "activation"]
    found: dict[bytes, Assignment] = {}
    for format_ in candidates.formats:
        choice = np.array([_nearest(candidates, u, format_.bits, format_.name) for u in range(len(candidates.units))])
        variants = {f"uniform {format_.name}": choice}
        if embeddings and format_.bits < 8:
            wider = choice.copy()
            wider[embeddings] = [_nearest(candidates, u, 8, None) for u in embeddings]
            variants[f"uniform {format_.name}, 8-bit embeddings"] = wider
        if caches:
            variants |= {
                f"{name}, {bits}-bit cache": _with_cache(candidates, variant, caches, bits)
                for name, variant in variants.items()
                for bits in CACHE_BITS
            }
        if activations:
            variants = {
                f"{name}, {candidates.formats[a].name} activations": _with_activations(variant, activations, a)
                for name, variant in variants.items()
                for a in np.flatnonzero(candidates.allowed[activations].all(axis=0)).tolist()
            }
        for name, variant in variants.items():
            assignment = Assignment(name=name, kind="uniform", metric=metric, choice=variant.astype(np.int64))
            found.setdefault(assignment.choice.tobytes(), assignment)
    return list(found.values())


def keep_widest_caches(
    assignments: Sequence[Assignment], candidates: Candidates, memory: CostTable
) -> list[Assignment]:
    """Returns of the assignments that differ in caches alone the one with most bytes of cache, in their order.

    Where caches are no units that is every assignment.

    Args:
        assignments: Without two of the same choice.
        candidates: Units and formats.
        memory: Bytes of each candidate.
    """
    widest: dict[tuple[tuple[str, str], ...], Assignment] = {}
    for assignment in assignments:
        rest = {**assignment.formats_by_weight(candidates), **assignment.formats_by_activation(candidates)}
        weights = tuple(rest.items())
        known = widest.get(weights)
        if known is None or cache_use(candidates, assignment.choice, memory) > cache_use(
            candidates, known.choice, memory
        ):
            widest[weights] = assignment
    return [a for a in assignments if any(a is kept for kept in widest.values())]


def keep_best_activations(
    assignments: Sequence[Assignment], profile: SensitivityProfile, metric: str
) -> list[Assignment]:
    """Returns of the assignments with the same formats of weights the one that is predicted to lose least."""
    loss = profile.table(metric).loss
    best: dict[tuple[tuple[str, str], ...], Assignment] = {}
    for assignment in assignments:
        weights = tuple(assignment.formats_by_weight(profile.candidates).items())
        known = best.get(weights)
        if known is None or pick(loss, assignment.choice).sum() < pick(loss, known.choice).sum():
            best[weights] = assignment
    return list(best.values())


def _with_cache(candidates: Candidates, choice: NDArray[np.int64], caches: list[int], bits: int) -> NDArray[np.int64]:
    changed = choice.copy()
    changed[caches] = [_nearest(candidates, u, bits, None) for u in caches]
    return changed


def _with_activations(choice: NDArray[np.int64], activations: list[int], f: int) -> NDArray[np.int64]:
    changed = choice.copy()
    changed[activations] = f
    return changed


def _nearest(candidates: Candidates, u: int, bits: int, name: str | None) -> int:
    allowed = [int(f) for f in np.flatnonzero(candidates.allowed[u])]
    by_name = [f for f in allowed if candidates.formats[f].name == name]
    wider = [f for f in allowed if candidates.formats[f].bits >= bits]
    if by_name:
        return by_name[0]
    unit = candidates.units[u]

    def stored_bytes(f: int) -> int:
        if unit.cache_shape is not None:
            return cache_bytes(candidates.formats[f], unit.cache_shape, max(TOKEN_BLOCKS))
        if not unit.weights:
            return candidates.formats[f].bits
        return candidates.formats[f].storage_bytes(unit.weights[0].shape)

    if wider:
        return min(wider, key=stored_bytes)
    return max(allowed, key=stored_bytes)
