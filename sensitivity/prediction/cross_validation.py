"""Cross-validation of predicted losses: by unit, in the logarithm.

All formats of a unit are in one fold: they share the unit's weights and its place in the model, so a rule that saw
one of them would be judged too kindly on the others. Losses span many orders of magnitude and are predicted up to a
factor, so errors are those of log loss:

    R2            = 1 - sum (log loss - log predicted)^2 / sum (log loss - mean log loss)^2
    median factor = exp(median |log loss - log predicted|)
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sensitivity.profile import NATS, LossTable

_Float = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CrossValidatedError:
    """How well losses of units that were not seen are predicted.

    Args:
        r2: Share of the variance of log loss that is explained; negative if worse than the mean.
        median_factor: Factor by which half of the predictions are off at most; at least 1.
        log_deviation: Root mean square error of log loss.
        folds: Number of folds.
        pair_count: Number of (unit, format) pairs.
    """

    r2: float
    median_factor: float
    log_deviation: float
    folds: int
    pair_count: int

    def __str__(self) -> str:
        return (
            f"R2 {self.r2:.3f}, half within a factor of {self.median_factor:.2f} "
            f"({self.folds} folds of units, {self.pair_count} pairs)"
        )


def find_measured_pairs(table: LossTable, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Returns the pairs [U, F] that a rule can be fitted to: measured, not completed, and with a positive loss.

    Raises:
        ValueError: If the losses are not in nats per token, or of another shape.
    """
    if table.unit_of_measure != NATS or table.loss.shape != shape:
        msg = (
            f"measured losses must be in {NATS} and of shape {shape}: got {table.unit_of_measure}, "
            f"{table.loss.shape}. Name a metric that predicts KL."
        )
        raise ValueError(msg)
    positive: NDArray[np.bool_] = table.loss > 0.0
    return positive if table.measured is None else positive & table.measured


def assign_folds(unit_index: NDArray[np.int64], folds: int, seed: int) -> NDArray[np.int64]:
    """Returns the fold [N] of every row, all rows of a unit in one fold, units shuffled.

    Args:
        unit_index: [N], the unit of each row.
        folds: Number of folds, at least 2.
        seed: Seed of the shuffle.

    Raises:
        ValueError: If there are fewer units than folds, or fewer than two folds.
    """
    units = np.unique(unit_index)
    if not 2 <= folds <= len(units):
        msg = (
            f"folds must be from 2 to the number of measured units: got folds={folds}, {len(units)} units. "
            "Measure more units or take fewer folds."
        )
        raise ValueError(msg)
    shuffled = np.random.default_rng(seed).permutation(units)
    fold_of_unit = dict(zip(shuffled.tolist(), (i % folds for i in range(len(units))), strict=True))
    return np.array([fold_of_unit[u] for u in unit_index.tolist()])


def predict_out_of_fold(
    fold: NDArray[np.int64], fit: Callable[[NDArray[np.bool_]], Callable[[NDArray[np.bool_]], _Float]]
) -> _Float:
    """Returns predictions [N] for every row by the rule fitted to the other folds.

    Args:
        fold: [N].
        fit: From a mask of rows to fit, to a function from a mask of rows to their predictions.
    """
    predicted = np.zeros(len(fold))
    for k in np.unique(fold):
        held_out = fold == k
        predicted[held_out] = fit(~held_out)(held_out)
    return predicted


def judge(log_loss: _Float, log_predicted: _Float, folds: int) -> CrossValidatedError:
    """Returns the error of out-of-fold predictions.

    Args:
        log_loss: [N] measured.
        log_predicted: [N] out of fold.
        folds: Number of folds.
    """
    residual = log_loss - log_predicted
    spread = float(np.square(log_loss - log_loss.mean()).sum())
    squares = float(np.square(residual).sum())
    return CrossValidatedError(
        r2=1.0 - squares / spread if spread > 0.0 else float(squares == 0.0),
        median_factor=float(np.exp(np.median(np.abs(residual)))),
        log_deviation=float(np.sqrt(squares / len(residual))),
        folds=folds,
        pair_count=len(residual),
    )
