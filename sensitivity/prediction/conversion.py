"""Conversion of a criterion in a unit of its own to nats per token, fitted to pairs with a measured loss.

    log loss = intercept + slope log criterion                     (least squares), or
    log loss = a monotone step function of log criterion           (isotonic regression), linear between its steps.

Beyond the ends of the fitted range the straight line goes on; the monotone one goes on with the line's slope. A
criterion of zero means no error, and stays zero. The conversion predicts the median of the loss, not its mean: it is
right up to a factor, whose size the cross-validated error tells. A straight line keeps the order of all candidates,
but changes the order of plans unless the slope is one, because plans are sums.

Complexity: N log N for N pairs. Limits: one model, one quantizer, the range of the fitted pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from sensitivity.prediction.cross_validation import (
    CrossValidatedError,
    assign_folds,
    find_measured_pairs,
    judge,
    predict_out_of_fold,
)
from sensitivity.profile import NATS, LossTable

_Float = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A fitted conversion.

    Args:
        slope: Of log loss over log criterion.
        intercept: log loss at criterion one.
        steps: (log criterion, log loss) of a monotone conversion in rising order; empty for a straight line.
        error: Its cross-validated error.
    """

    slope: float
    intercept: float
    steps: tuple[tuple[float, float], ...]
    error: CrossValidatedError

    def log_loss(self, log_criterion: _Float) -> _Float:
        """Returns log loss of log criterion."""
        return _predict(self.slope, self.intercept, self.steps, log_criterion)

    def __str__(self) -> str:
        shape = f"monotone in {len(self.steps)} steps" if self.steps else "a straight line"
        return f"loss = {np.exp(self.intercept):.3g} x criterion^{self.slope:.2f}, {shape}: {self.error}"


def fit_conversion(
    criterion: _Float, measured: LossTable, *, monotone: bool = False, folds: int = 5, seed: int = 0
) -> Conversion:
    """Returns the conversion that fits best, with its error on units that it was not fitted to.

    Args:
        criterion: [U, F]; pairs where it is not positive take no part.
        measured: Losses [U, F] in nats per token; likewise, and completed pairs.
        monotone: Whether to fit a monotone function instead of a straight line.
        folds: Folds of the cross-validation.
        seed: Seed of the folds.

    Raises:
        ValueError: If the measured losses are not in nats per token, the shapes differ, or too few units are measured.
    """
    unit_index, format_index = np.nonzero((criterion > 0.0) & find_measured_pairs(measured, criterion.shape))
    x, y = (np.log(table[unit_index, format_index]) for table in (criterion, measured.loss))
    fold = assign_folds(unit_index, folds, seed)

    def fit(rows: NDArray[np.bool_]) -> Callable[[NDArray[np.bool_]], _Float]:
        fitted = _fit(x[rows], y[rows], monotone)
        return lambda others: _predict(*fitted, x[others])

    error = judge(y, predict_out_of_fold(fold, fit), folds)
    slope, intercept, steps = _fit(x, y, monotone)
    return Conversion(slope=slope, intercept=intercept, steps=steps, error=error)


def convert(conversion: Conversion, criterion: _Float) -> LossTable:
    """Returns the criterion [U, F] in nats per token; the standard error is the cross-validated one."""
    positive = criterion > 0.0
    log_loss = conversion.log_loss(np.log(np.where(positive, criterion, 1.0)))
    loss = np.where(positive, np.exp(log_loss), 0.0)
    return LossTable(loss=loss, std_error=loss * conversion.error.log_deviation, unit_of_measure=NATS)


def _fit(x: _Float, y: _Float, monotone: bool) -> tuple[float, float, tuple[tuple[float, float], ...]]:
    centred = x - x.mean()
    spread = float(centred @ centred)
    slope = float(centred @ y) / spread if spread > 0.0 else 0.0
    intercept = float(y.mean() - slope * x.mean())
    if not monotone:
        return slope, intercept, ()
    order = np.argsort(x, kind="stable")
    fitted = isotonic_regression(y[order])
    ends = fitted.blocks
    # One point for each block of equal values, at the middle of its pairs.
    steps = tuple(
        (float(x[order][start:stop].mean()), float(fitted.x[start]))
        for start, stop in zip(ends[:-1], ends[1:], strict=True)
    )
    return slope, intercept, steps


def _predict(slope: float, intercept: float, steps: tuple[tuple[float, float], ...], x: _Float) -> _Float:
    if not steps:
        return intercept + slope * x
    at, value = np.array(steps).T
    beyond = np.minimum(x - at[0], 0.0) + np.maximum(x - at[-1], 0.0)
    log_loss: _Float = np.interp(x, at, value) + max(slope, 0.0) * beyond
    return log_loss
