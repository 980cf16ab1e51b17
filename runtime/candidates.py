"""Candidates: which formats each unit may take, with the reason for every refusal.

All legality is decided here, before any solve: shapes, the embedding's own menu, and the user's pins.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime.engine_rules import Engine
from runtime.formats import Format, find_formats
from runtime.units import Unit

EMBEDDING_LEAST_BITS = 4


class NoLegalFormat(ValueError):
    """An engine runs none of the measured formats in some unit."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Units, formats and the allowed pairs.

    Args:
        units: U units.
        formats: F formats.
        allowed: [U, F] bool.
        reasons: Reason of every refusal, by (unit index, format index).
    """

    units: tuple[Unit, ...]
    formats: tuple[Format, ...]
    allowed: NDArray[np.bool_]
    reasons: Mapping[tuple[int, int], str]

    def format_index(self, name: str) -> int:
        """Returns the column of a format.

        Raises:
            ValueError: If the format is not among the candidates.
        """
        names = [f.name for f in self.formats]
        if name not in names:
            msg = f"format must be among the candidates: got '{name}', candidates are {', '.join(names)}."
            raise ValueError(msg)
        return names.index(name)


def list_candidates(
    units: Sequence[Unit],
    format_names: Sequence[str],
    *,
    embedding_formats: Sequence[str] | None = None,
    pins: Mapping[str, str] | None = None,
    engine: Engine | None = None,
) -> Candidates:
    """Returns the allowed formats of every unit.

    Args:
        units: U units.
        format_names: F names of formats.
        embedding_formats: Names among ``format_names`` that embeddings and heads may take; None for those of
            ``EMBEDDING_LEAST_BITS`` bits or more (a token's row is read alone: no sum averages its error).
        pins: Regular expression on unit names -> the one format that the matching units take.
        engine: Engine that must be able to run every candidate; its fusions are those of the units already.

    Raises:
        ValueError: If a format is unknown, a pin is no regular expression, matches nothing or asks for what
            cannot be, or a unit is left without any format.
    """
    formats = find_formats(format_names)
    if embedding_formats is not None:
        find_formats(embedding_formats)
    reasons: dict[tuple[int, int], str] = {}
    pinned = _resolve_pins(units, formats, pins or {})
    for u, unit in enumerate(units):
        for f, format_ in enumerate(formats):
            reason = _refusal(unit, format_, embedding_formats, pinned.get(u))
            if reason:
                reasons[u, f] = reason
    allowed = np.ones((len(units), len(formats)), dtype=bool)
    for u, f in reasons:
        allowed[u, f] = False
    for u in np.flatnonzero(~allowed.any(axis=1)).tolist():
        msg = (
            f"every unit must have an allowed format: unit '{units[u].name}' has none "
            f"({'; '.join(dict.fromkeys(reasons[u, f] for f in range(len(formats))))}). "
            "Add a channel format or bf16, or change the pin."
        )
        raise ValueError(msg)
    candidates = Candidates(units=tuple(units), formats=formats, allowed=allowed, reasons=reasons)
    return candidates if engine is None else refuse_by_engine(candidates, engine)


def refuse_by_engine(candidates: Candidates, engine: Engine) -> Candidates:
    """Returns the candidates that an engine can run, with its reasons beside those that were there.

    Raises:
        NoLegalFormat: If a unit is left without any format.
    """
    allowed, reasons = candidates.allowed.copy(), dict(candidates.reasons)
    for u, f in np.ndindex(allowed.shape):
        format_ = candidates.formats[f]
        reason = engine.refusal(candidates.units[u], format_)
        # What an engine would store instead, without a word, is worth more than that a row does not divide.
        if reason is not None and (allowed[u, f] or format_.name in engine.instead):
            allowed[u, f] = False
            reasons[u, f] = reason
    for u in np.flatnonzero(~allowed.any(axis=1)).tolist():
        found = "; ".join(dict.fromkeys(reasons[u, f] for f in range(len(candidates.formats))))
        msg = (
            f"every unit must have a format that {engine.name} runs: unit '{candidates.units[u].name}' has none "
            f"({found}). Measure with --engine {engine.name}, or with --formats that hold one of its own."
        )
        raise NoLegalFormat(msg)
    return replace(candidates, allowed=allowed, reasons=reasons)


def _refusal(unit: Unit, format_: Format, embedding_formats: Sequence[str] | None, pin: str | None) -> str | None:
    for weight in unit.weights:
        misfit = format_.refusal(weight.shape[1])
        if misfit is not None:
            return misfit
    if pin is not None:
        return None if format_.name == pin else f"pinned to {pin}"
    if unit.kind in ("embedding", "head"):
        if embedding_formats is not None:
            return None if format_.name in embedding_formats else "not among embedding_formats"
        if format_.bits < EMBEDDING_LEAST_BITS:
            return f"embeddings and heads take {EMBEDDING_LEAST_BITS} bits or more by default"
    return None


def _resolve_pins(units: Sequence[Unit], formats: Sequence[Format], pins: Mapping[str, str]) -> dict[int, str]:
    pinned: dict[int, str] = {}
    names = {f.name for f in formats}
    for pattern, format_name in pins.items():
        if format_name not in names:
            msg = f"a pin must name one of the formats: got '{pattern}={format_name}', formats are {sorted(names)}."
            raise ValueError(msg)
        try:
            matches = [u for u, unit in enumerate(units) if re.search(pattern, unit.name)]
        except re.error as error:
            msg = f"a pin must be a regular expression: got '{pattern}' ({error}). Correct the pattern."
            raise ValueError(msg) from error
        if not matches:
            msg = f"a pin must match at least one unit: got '{pattern}', e.g. '{units[0].name}' is a unit's name."
            raise ValueError(msg)
        pinned.update(dict.fromkeys(matches, format_name))
    return pinned
