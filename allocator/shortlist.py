"""A shortlist of a long menu: few formats that lose nearly nothing against all of them, found from weights alone.

Rendering three hundred formats of every weight takes hours, and most of them are below the best of others. With the
squared relative error e[w, f] of a format f on a weight w, its stored bits b[w, f], and h_w(b) the lower convex hull of
these points, an additive loss that is proportional to e within each unit,

    loss[u, f] = k_u * e[u, f],   k_u >= 0 unknown,

is at any budget minimised, up to the rounding of one unit, on the hulls alone. So formats are dropped as long as the
hulls of the rest stay close: h_w^rest(b) + d <= (1 + t) (h_w(b) + d) at every b and on every sampled weight. That
bounds the loss of the best plan of the shortlist by (1 + t) times that of the best plan of the menu, in this model,
whatever the k_u and the budget are; d is an error that counts as none.

Sampled are the first, the middle and the last unit of each role, shape and set of allowed formats, a few rows of their
first weight; more rows for formats whose rows share something. The proportionality is an assumption: across families
errors of equal size differ in what they do, and a quantizer that reads inputs helps some formats more than others.

Complexity: sampled weights times formats renderings of a few rows; K^2 hulls of K points to drop formats one by one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.candidates import Candidates
from runtime.formats import Format
from runtime.loading import ReferenceModel
from runtime.quantizers import STATISTICAL
from runtime.rendering import render
from runtime.residency import Residency
from runtime.units import read_weight
from sensitivity.pieces import Piece, read_or_measure
from sensitivity.profile import fingerprint_of

# In place of names of formats: all that there are, of which the shortlist is measured.
MENU = "menu"
# Raised whenever the same weights would give another shortlist.
SHORTLIST_VERSION = 1
TOLERANCE = 0.05
NO_ERROR = 1e-6
_ROWS, _ROWS_THAT_SHARE = 64, 1024
_BY_WEIGHTS_ALONE = "clipping"


@dataclass(frozen=True, kw_only=True, eq=False)
class MenuErrors:
    """What formats do to sampled weights.

    Args:
        units: Index of the unit of each of the W sampled weights.
        bits: [W, F] stored bits per weight; infinite where a pair is not allowed.
        error: [W, F] squared relative error; infinite likewise.
    """

    units: tuple[int, ...]
    bits: NDArray[np.float64]
    error: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Shortlist:
    """Formats that stand for a menu.

    Args:
        candidates: Those of the menu, for these formats alone.
        menu: Number of formats they were taken from.
        bound: No plan of the menu is better than the best of these by a larger factor, for losses proportional to the
            squared errors of the sampled weights.
    """

    candidates: Candidates
    menu: int
    bound: float

    def describe(self) -> str:
        """Returns the shortlist as a short text."""
        return f"{len(self.candidates.formats)} of {self.menu} formats, bound {self.bound:.4f}"


def find_shortlist(
    reference: ReferenceModel,
    candidates: Candidates,
    *,
    quantizer: str,
    kept: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Shortlist:
    """Returns the shortlist of the formats of candidates.

    Args:
        reference: The model.
        candidates: Units and the formats of the menu.
        quantizer: Name in ``QUANTIZERS`` that integer formats are rendered with; ``clipping`` in place of one that
            reads inputs.
        kept: Directory where errors are kept and found again; None to measure them anew.
        progress: Called with (weights done, weights in all).
    """
    errors = find_menu_errors(reference, candidates, quantizer=quantizer, kept=kept, progress=progress)
    chosen, bound = choose_formats(errors)
    return Shortlist(candidates=_keep(candidates, chosen), menu=len(candidates.formats), bound=bound)


def find_menu_errors(
    reference: ReferenceModel,
    candidates: Candidates,
    *,
    quantizer: str,
    kept: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MenuErrors:
    """Returns what the formats of candidates do to a sample of the weights; arguments as of ``find_shortlist``."""
    rule = _BY_WEIGHTS_ALONE if quantizer in STATISTICAL else quantizer
    asked = {
        "version": SHORTLIST_VERSION,
        "model": reference.weights_fingerprint,
        "formats": [f.name for f in candidates.formats],
        "allowed": candidates.allowed.astype(int).tolist(),
        "quantizer": rule,
    }
    units = sample_units(candidates)

    def measure() -> Piece:
        errors = measure_menu(reference, candidates, units, quantizer=rule, progress=progress)
        return {"bits": errors.bits, "error": errors.error}

    path = None if kept is None else kept / f"{fingerprint_of(asked)}.safetensors"
    return MenuErrors(units=units, **read_or_measure(path, measure))


def sample_units(candidates: Candidates) -> tuple[int, ...]:
    """Returns the first, the middle and the last unit of each role, shape and set of allowed formats."""
    alike: dict[tuple[str, str, tuple[int, int], bytes], list[int]] = {}
    for u, unit in enumerate(candidates.units):
        key = (unit.kind, unit.role, unit.weights[0].shape, candidates.allowed[u].tobytes())
        alike.setdefault(key, []).append(u)
    return tuple(sorted({own[i] for own in alike.values() for i in (0, len(own) // 2, -1)}))


@torch.no_grad()
def measure_menu(
    reference: ReferenceModel,
    candidates: Candidates,
    units: Sequence[int],
    *,
    quantizer: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MenuErrors:
    """Returns stored bits and squared relative errors of every allowed format on a few rows of some units.

    Args:
        reference: The model.
        candidates: Units and formats.
        units: Indices of the W units.
        quantizer: Name of a quantizer that reads the weight alone.
        progress: Called with (weights done, weights in all).
    """
    residency: Residency = reference.residency
    bits, error = (np.full((len(units), len(candidates.formats)), np.inf) for _ in range(2))
    progress(0, len(units))
    for w, u in enumerate(units):
        weight = candidates.units[u].weights[0]
        with residency.resident(residency.block_of(weight.parameter)):
            values = read_weight(reference.model, weight)
            for f in np.flatnonzero(candidates.allowed[u]).tolist():
                format_ = candidates.formats[f]
                bits[w, f] = 8 * format_.storage_bytes(weight.shape) / weight.weight_count
                error[w, f] = _relative_error(_some_rows(values, format_), format_, quantizer)
        progress(w + 1, len(units))
    return MenuErrors(units=tuple(units), bits=bits, error=error)


def choose_formats(errors: MenuErrors, *, tolerance: float = TOLERANCE) -> tuple[tuple[int, ...], float]:
    """Returns the indices of few formats whose hulls are close to those of all, and how close.

    Formats that are no vertex of any hull are dropped, then one by one the format whose absence is felt least.

    Args:
        errors: Of all formats.
        tolerance: The largest t.

    Returns:
        The indices in order, and 1 + t as it is, at least 1.
    """
    squared = errors.error + NO_ERROR
    points = [np.flatnonzero(np.isfinite(row)) for row in errors.bits]
    chosen = sorted(
        {
            int(own[np.lexsort((squared[w, own], errors.bits[w, own]))][k])
            for w, own in enumerate(points)
            for k in _vertices(errors.bits[w, own], squared[w, own])
        }
    )

    def excess(formats: Sequence[int]) -> float:
        factors = (
            hull_excess(errors.bits[w], squared[w], own, [f for f in formats if f in own], errors.bits[w, own])
            for w, own in enumerate(points)
        )
        return max(1.0, *(float(factor.max()) for factor in factors))

    bound = excess(chosen)
    while len(chosen) > 1:
        rest = [[f for f in chosen if f != dropped] for dropped in chosen]
        excesses = [excess(formats) for formats in rest]
        k = int(np.argmin(excesses))
        if excesses[k] > 1.0 + tolerance:
            break
        chosen, bound = rest[k], excesses[k]
    return tuple(chosen), bound


def hull_excess(
    bits: NDArray[np.float64],
    loss: NDArray[np.float64],
    formats: Sequence[int] | NDArray[np.int64],
    kept: Sequence[int],
    at: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Returns the factor [B] by which the hull of some formats exceeds that of all; infinite where it does not reach.

    Args:
        bits: [F] of a unit.
        loss: [F] of it, positive.
        formats: Indices of all.
        kept: Indices of some of them.
        at: [B] bits, not below the least of all formats.
    """
    own, some = np.asarray(formats, dtype=np.int64), np.asarray(kept, dtype=np.int64)
    if not some.size:
        return np.full(len(at), np.inf)
    factor: NDArray[np.float64] = np.interp(at, *_hull(bits[some], loss[some])) / np.interp(
        at, *_hull(bits[own], loss[own])
    )
    # A budget that all formats together could keep is out of reach.
    factor[at < bits[some].min()] = np.inf
    return factor


def _vertices(bits: NDArray[np.float64], error: NDArray[np.float64]) -> list[int]:
    """Returns the vertices of the falling part of the lower hull, as positions in the order of bits and error."""
    order = np.lexsort((error, bits))
    x, y = bits[order], error[order]
    found: list[int] = []
    for k in range(len(x)):
        if found and (x[k] == x[found[-1]] or y[k] >= y[found[-1]]):
            continue
        while len(found) > 1:
            a, b = found[-2:]
            if (y[b] - y[a]) * (x[k] - x[a]) < (y[k] - y[a]) * (x[b] - x[a]):
                break
            found.pop()
        found.append(k)
    return found


def hull_vertices(bits: NDArray[np.float64], loss: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns the indices of the vertices of the falling part of the lower hull of points [F], by rising bits."""
    order = np.lexsort((loss, bits))
    return order[_vertices(bits, loss)]


def _hull(bits: NDArray[np.float64], error: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    vertices = hull_vertices(bits, error)
    return bits[vertices], error[vertices]


def _some_rows(values: Tensor, format_: Format) -> Tensor:
    """Returns evenly spread rows [R, in_features] of a weight."""
    one, two = (format_.storage_bytes((rows, values.shape[1])) for rows in (1, 2))
    most = _ROWS if two == 2 * one else _ROWS_THAT_SHARE
    if len(values) <= most:
        return values
    return values[torch.arange(most) * len(values) // most]


def _relative_error(values: Tensor, format_: Format, quantizer: str) -> float:
    power = float(values.double().square().sum())
    error = float((render(values, format_, quantizer).double() - values.double()).square().sum())
    return error / power if power else 0.0


def _keep(candidates: Candidates, chosen: Sequence[int]) -> Candidates:
    columns = {f: k for k, f in enumerate(chosen)}
    return replace(
        candidates,
        formats=tuple(candidates.formats[f] for f in chosen),
        allowed=candidates.allowed[:, list(chosen)],
        reasons={(u, columns[f]): reason for (u, f), reason in candidates.reasons.items() if f in columns},
    )
