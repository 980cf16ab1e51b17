"""Candidates of two kinds on common axes: weights and what is measured beside them, caches or activations."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.candidates import Candidates
from sensitivity.profile import NATS, LossTable


class JoinedCandidates:
    """Two sets of candidates over the formats of both, and tables that follow them.

    Args:
        first: Candidates whose units and formats come first: weights, or what is joined already.
        second: Candidates of what is measured beside them.
        words: What the two are called in the reasons of refusals.
    """

    def __init__(self, first: Candidates, second: Candidates, *, words: tuple[str, str]) -> None:
        formats = tuple(dict.fromkeys([*first.formats, *second.formats]))
        self._shape = (len(first.units) + len(second.units), len(formats))
        self._first = np.ix_(np.arange(len(first.units)), np.arange(len(first.formats)))
        rows = np.arange(len(first.units), self._shape[0])
        columns = np.array([formats.index(f) for f in second.formats])
        self._second = np.ix_(rows, columns)
        reasons = {
            **first.reasons,
            **{(int(rows[u]), int(columns[f])): reason for (u, f), reason in second.reasons.items()},
        }
        allowed = self._fill(first.allowed, second.allowed, False)
        for u, f in zip(*np.nonzero(~allowed), strict=True):
            reasons.setdefault((int(u), int(f)), f"a format of {words[0] if u in rows else words[1]}")
        units = (*first.units, *second.units)
        self.candidates = Candidates(units=units, formats=formats, allowed=allowed, reasons=reasons)

    def join(self, first: LossTable, second: LossTable) -> LossTable:
        """Returns the table of both, with NaN for the second where the metric of the first is not in nats per token."""
        if first.unit_of_measure != NATS:
            nothing = np.full_like(second.loss, np.nan)
            second = LossTable(loss=nothing, std_error=nothing, unit_of_measure=first.unit_of_measure)
        measured = first.measured
        return LossTable(
            loss=self._fill(first.loss, second.loss, 0.0),
            std_error=self._fill(first.std_error, second.std_error, 0.0),
            unit_of_measure=first.unit_of_measure,
            measured=None if measured is None else self._fill(measured, np.ones_like(second.loss, dtype=bool), True),
        )

    def pad_sketch(self, sketch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns [S, U, F] of both, zero for the second, from that of the first."""
        padded = np.zeros((len(sketch), *self._shape), dtype=np.float32)
        for own, part in zip(padded, sketch, strict=True):
            own[self._first] = part
        return padded

    def pad_gram(self, gram: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns [2, U * F, U * F] of both, zero for the second, from that of the first."""
        flat = np.arange(self._shape[0] * self._shape[1]).reshape(self._shape)[self._first].ravel()
        padded = np.zeros((len(gram), self._shape[0] * self._shape[1], self._shape[0] * self._shape[1]), np.float32)
        for own, part in zip(padded, gram, strict=True):
            own[np.ix_(flat, flat)] = part
        return padded

    def _fill(self, first: NDArray[Any], second: NDArray[Any], rest: Any) -> NDArray[Any]:
        table = np.full(self._shape, rest, dtype=first.dtype)
        table[self._first] = first
        table[self._second] = second
        return table
