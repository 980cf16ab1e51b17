"""Completion: the losses of all pairs from those of some, by what the measured ones are to a reference metric.

A reference covers all pairs at a price that does not grow with them (the Fisher loss, else the output or weight
error). What is modelled is the ratio, which varies far less than the loss:

    y_uf = log(loss_uf / reference_uf) = z_uf b + c_u + e_uf    b_j ~ N(0, s^2 d_j), c_u ~ N(0, s^2 g), e ~ N(0, s^2)

The columns z are a mean, the format, the role, format and role together, depth (``_WAVES`` cosines over the layers,
the j-th with 1 / j of the size), depth and role together, and log(other reference / reference). That is a ridge
regression: each group of columns has one variance d, the units' own effects the variance g, both shrink the effects
towards 0, and all are chosen by exact leave-one-out error, the smallest of those as good. With
V = I + g B + Z D Z^T (B: same unit) it is known without refitting,

    y_i - y_(-i) = [V^-1 (y - mean)]_i / [V^-1]_ii        s^2 = mean of its square times [V^-1]_ii,

and V^-1 needs only the inverse of a matrix of the P columns: (I + g B)^-1 subtracts g / (1 + n_u g) times a unit's
sum. O(N P^2) a trial, for N measured pairs, and some hundred trials; O(U F P^2) for the completion.

A completed loss is reference * exp(y), the median of a log-normal; its standard error is the loss times the
predicted standard deviation of y, which holds the residuals of measured pairs and grows where a unit or a role was
not measured. Limits: the spread is one number for all pairs, estimated from the measured ones, so it is rough below
a few dozen of these; without a Fisher loss every unit should have two measured pairs of its own, as neither error
says what the model makes of it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.candidates import Candidates
from sensitivity.profile import LossTable

# KL below it is the rounding of float32 logits: a ratio to it says nothing.
_LEAST_LOSS = 1e-11
_LEAST_KNOWN = 2
_WAVES = 8
_VARIANCES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1e4)
_MEAN_VARIANCE = 1e4
_START = 0.1
_SWEEPS = 4
_LEAST_REPEATED = 8  # units with two pairs or more
_BLOCK = 8192  # pairs completed at a time

FloatArray = NDArray[np.float64]


def complete(
    table: LossTable,
    measured: NDArray[np.bool_],
    *,
    references: Sequence[FloatArray],
    candidates: Candidates,
    lossy: NDArray[np.bool_],
) -> LossTable:
    """Returns a table whose unmeasured losses are predicted from its measured ones.

    Args:
        table: Losses [U, F], read at the measured pairs.
        measured: [U, F] bool, among ``lossy``.
        references: Tables [U, F] of all pairs, the one nearest to the loss first; the last is positive wherever
            ``lossy`` is, and stands in where another is zero (an expert that no calibration token visits).
        candidates: Units, formats, allowed pairs.
        lossy: [U, F] bool, the allowed pairs whose loss is not exactly zero.

    Raises:
        ValueError: If fewer than two measured losses are above zero, or a number is not finite.
    """
    base, *others = [_positive(reference, references[-1], lossy) for reference in references]
    _check(table, measured, [base, *others], candidates, lossy)
    unit, format_ = np.nonzero(measured & (table.loss > _LEAST_LOSS))
    columns = _Columns(candidates, [_standardized_log_ratio(other, base, lossy) for other in others])
    y = np.log(table.loss[unit, format_] / base[unit, format_])
    observed = _Observed(columns.at(unit, format_), y - y.mean(), unit)
    fit = _choose_fit(observed, columns.groups)
    loss = np.where(measured, table.loss, 0.0)
    std_error = np.where(measured, table.std_error, 0.0)
    rows, formats = np.nonzero(lossy & ~measured)
    for start in range(0, len(rows), _BLOCK):
        u, f = rows[start : start + _BLOCK], formats[start : start + _BLOCK]
        log_ratio, deviation = fit.predict(columns.at(u, f), u)
        loss[u, f] = base[u, f] * np.exp(y.mean() + log_ratio)
        std_error[u, f] = loss[u, f] * deviation
    return LossTable(
        loss=loss,
        std_error=std_error,
        unit_of_measure=table.unit_of_measure,
        measured=measured | (candidates.allowed & ~lossy),
    )


def _positive(reference: FloatArray, stand_in: FloatArray, lossy: NDArray[np.bool_]) -> FloatArray:
    """Returns a reference whose zeros are the stand-in times the least ratio of the two that the format has."""
    lacking = lossy & (reference <= 0.0)
    if not lacking.any():
        return reference
    known = lossy & (reference > 0.0)
    ratio = np.divide(reference, stand_in, out=np.full_like(reference, np.inf), where=known)
    least = ratio.min(axis=0)
    overall = least.min()
    least = np.where(np.isfinite(least), least, overall if np.isfinite(overall) else 1.0)
    return np.where(lacking, stand_in * least, reference)


def _standardized_log_ratio(other: FloatArray, base: FloatArray, lossy: NDArray[np.bool_]) -> FloatArray:
    ratio = np.zeros_like(base)
    ratio[lossy] = np.log(other[lossy] / base[lossy])
    ratio[lossy] -= ratio[lossy].mean()
    return np.asarray(ratio / (ratio[lossy].std() or 1.0))


def _check(
    table: LossTable,
    measured: NDArray[np.bool_],
    references: Sequence[FloatArray],
    candidates: Candidates,
    lossy: NDArray[np.bool_],
) -> None:
    for name, values, pairs in [("loss", table.loss, measured), *(("reference", r, lossy) for r in references)]:
        wrong = np.argwhere(pairs & ~np.isfinite(values))
        if len(wrong):
            u, f = wrong[0]
            msg = (
                f"a {name} must be a finite number: got {values[u, f]} in unit '{candidates.units[u].name}' at "
                f"{candidates.formats[f].name}. Check the weights of the model."
            )
            raise ValueError(msg)
    known = int((measured & (table.loss > _LEAST_LOSS)).sum())
    if known < _LEAST_KNOWN:
        msg = (
            f"at least {_LEAST_KNOWN} measured losses must be above zero, to predict the others from: got {known} of "
            f"{int(measured.sum())}. Measure more pairs (logit_passes, None for all)."
        )
        raise ValueError(msg)


class _Columns:
    """The columns z of any pairs: a mean, then group by group.

    Args:
        candidates: Units and formats.
        ratios: Tables [U, F] that are a column each.
    """

    def __init__(self, candidates: Candidates, ratios: Sequence[FloatArray]) -> None:
        names = sorted({unit.role for unit in candidates.units})
        self._role = np.eye(len(names))[[names.index(unit.role) for unit in candidates.units]]
        self._format = np.eye(len(candidates.formats))
        self._depth = _depth_waves([unit.layer_index for unit in candidates.units])
        self._ratios = ratios
        formats, roles = len(candidates.formats), len(names)
        self.groups = (formats, roles, formats * roles, _WAVES, _WAVES * roles, *(1 for _ in ratios))

    def at(self, unit: NDArray[np.int64], format_: NDArray[np.int64]) -> FloatArray:
        """Returns the columns [N, P] of N pairs."""
        formats, roles, depth = self._format[format_], self._role[unit], self._depth[unit]
        ratios = [ratio[unit, format_][:, None] for ratio in self._ratios]
        parts = [formats, roles, _products(formats, roles), depth, _products(depth, roles), *ratios]
        return np.concatenate([np.ones((len(unit), 1)), *parts], axis=1)


def _depth_waves(layers: Sequence[int | None]) -> FloatArray:
    """Returns smooth functions of depth [U, _WAVES]; zero outside of the layers, where there is no depth."""
    count = 1 + max((layer for layer in layers if layer is not None), default=0)
    known = np.array([layer is not None for layer in layers])
    place = (np.array([layer or 0 for layer in layers]) + 0.5) / count
    waves = np.arange(1, _WAVES + 1)
    return np.asarray(known[:, None] * 2**0.5 * np.cos(np.pi * place[:, None] * waves) / waves)


def _products(a: FloatArray, b: FloatArray) -> FloatArray:
    return (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)


class _Observed:
    """The measured pairs, in the order of their units.

    Args:
        columns: [N, P].
        y: [N], of mean zero.
        unit: [N] indices, ascending.
    """

    def __init__(self, columns: FloatArray, y: FloatArray, unit: NDArray[np.int64]) -> None:
        self.columns, self.y = columns, y
        self.units, self._starts, self.place, self.counts = np.unique(
            unit, return_index=True, return_inverse=True, return_counts=True
        )

    def sums(self, values: FloatArray) -> FloatArray:
        """Returns the sums of values [N, ...] over each unit's pairs."""
        return np.asarray(np.add.reduceat(values, self._starts, axis=0))


class _Fit:
    """The regression for given variances.

    Args:
        observed: The measured pairs.
        variances: [P], of the columns, relative to that of the residual.
        unit_variance: That of the units' own effects.
    """

    def __init__(self, observed: _Observed, variances: FloatArray, unit_variance: float) -> None:
        self._observed, self._unit_variance = observed, unit_variance
        # With columns of variance 1 a variance of 0 needs no case of its own.
        self._scale = np.sqrt(variances)
        self._columns = observed.columns * self._scale
        self._weight = unit_variance / (1.0 + observed.counts * unit_variance)
        whitened = self._without_units(self._columns)
        self._covariance = np.linalg.inv(np.eye(len(variances)) + self._columns.T @ whitened)
        self._coefficients = self._covariance @ (whitened.T @ observed.y)
        self._rest = observed.y - self._columns @ self._coefficients
        explained = ((whitened @ self._covariance) * whitened).sum(axis=1)
        precision = 1.0 - self._weight[observed.place] - explained
        left_out = self._without_units(self._rest) / precision
        self.error = float(np.square(left_out).mean())
        self._residual_variance = float((np.square(left_out) * precision).mean())

    def _without_units(self, values: FloatArray) -> FloatArray:
        """Returns (I + g B)^-1 values."""
        weight = self._weight.reshape(-1, *[1] * (values.ndim - 1))
        return values - (weight * self._observed.sums(values))[self._observed.place]

    def predict(self, columns: FloatArray, unit: NDArray[np.int64]) -> tuple[FloatArray, FloatArray]:
        """Returns the prediction [M] and its standard deviation [M] for columns [M, P] of pairs of units [M]."""
        columns = columns * self._scale
        # One more, for units that were not measured.
        known = np.full(int(max(unit.max(), self._observed.units.max())) + 1, len(self._observed.units))
        known[self._observed.units] = np.arange(len(self._observed.units))
        place = known[unit]
        weight = np.append(self._weight, 0.0)[:, None]
        learned = np.append(self._observed.sums(self._rest), 0.0)[:, None] * weight
        shared = np.concatenate([self._observed.sums(self._columns), np.zeros((1, columns.shape[1]))]) * weight
        counts = np.append(self._observed.counts, 0)
        own = self._unit_variance / (1.0 + counts * self._unit_variance)
        mean = columns @ self._coefficients + learned[place, 0]
        difference = columns - shared[place]
        spread = ((difference @ self._covariance) * difference).sum(axis=1) + own[place] + 1.0
        return mean, np.sqrt(self._residual_variance * spread)


def _choose_fit(observed: _Observed, groups: Sequence[int]) -> _Fit:
    """Returns the fit whose variances, chosen one after the other until none changes, leave the least error."""

    def fit(chosen: Sequence[float]) -> _Fit:
        variances = np.repeat([_MEAN_VARIANCE, *chosen[:-1]], [1, *groups])
        return _Fit(observed, variances, chosen[-1])

    # From single pairs a unit's own effect cannot be told from the residual; as residual it claims the least.
    repeated = int((observed.counts > 1).sum()) >= _LEAST_REPEATED
    candidates = [*[_VARIANCES] * len(groups), _VARIANCES if repeated else (0.0,)]
    chosen = [_START] * (len(groups) + 1)
    for _ in range(_SWEEPS):
        before = list(chosen)
        for i in range(len(chosen)):
            errors = np.array([fit([*chosen[:i], v, *chosen[i + 1 :]]).error for v in candidates[i]])
            # As little as is as good: a parameter alone gains 2 / N by chance (Akaike).
            close = errors <= errors.min() * (1.0 + 2.0 / len(observed.y))
            chosen[i] = candidates[i][int(close.argmax())]
        if chosen == before:
            break
    return fit(chosen)
