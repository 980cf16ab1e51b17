"""Learned predictor: log single-unit loss as a linear function of cheap features, fitted to measured pairs.

    log loss_uf = b + sum_p c_p (x_ufp - mean_p) / deviation_p,        min sum of squares + strength |c|^2

(ridge regression). Features: the logarithms of any tables [U, F] and scores [U] (weight error, output error,
kurtosis, ...), the bits, the group size and the symmetry of the format, the unit's role (one-hot), its relative depth
and that squared, and its number of weights. The strength is chosen by cross-validation by unit; the reported error is
that of a nested cross-validation, in which the fold that judges has no part in the choice.

The standard error of a prediction is that of a new observation: with X the standardized features and s the
cross-validated deviation, s^2 (1 + 1/N + x' (X'X + strength I)^-1 x) in log loss, times the loss (delta method).

Complexity: folds^2 x strengths solutions of P equations. Limits: it interpolates between the units of one model; of
models it was not fitted to it knows nothing.

Paper: in the spirit of Xu et al. 2024 (Scaling laws for post-training quantized LLMs, arXiv:2410.12119), who predict
the loss of whole models by a random forest on like features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.candidates import Candidates
from sensitivity.prediction.cross_validation import (
    CrossValidatedError,
    assign_folds,
    find_measured_pairs,
    judge,
    predict_out_of_fold,
)
from sensitivity.profile import NATS, LossTable

_Float = NDArray[np.float64]
_Rows = NDArray[np.bool_]
STRENGTHS = tuple(10.0**k for k in range(-2, 4))


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """What the predictor sees of every pair.

    Args:
        names: P names.
        values: [U, F, P] float64.
        lossy: [U, F] bool, allowed pairs with an error; all others are predicted to lose nothing.
    """

    names: tuple[str, ...]
    values: _Float
    lossy: _Rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """A fitted predictor.

    Args:
        names: P names of features.
        coefficients: [P], per standard deviation of a feature.
        intercept: Mean log loss of the fitted pairs.
        mean: [P] of the features of these pairs.
        deviation: [P] likewise.
        covariance: [P, P], (X'X + strength I)^-1.
        strength: Of the ridge.
        error: Its cross-validated error.
        predicted: [U, F] losses, each by a predictor that was fitted without its unit; zero where nothing was
            measured.
    """

    names: tuple[str, ...]
    coefficients: _Float
    intercept: float
    mean: _Float
    deviation: _Float
    covariance: _Float
    strength: float
    error: CrossValidatedError
    predicted: _Float


def build_features(
    candidates: Candidates, tables: Mapping[str, _Float], scores: Mapping[str, _Float] | None = None
) -> Features:
    """Returns the features of all candidates.

    Args:
        candidates: Units and formats.
        tables: Name -> criterion [U, F], not negative; at least one. Where all are zero, the format is lossless.
        scores: Name -> score [U], positive or NaN.

    Raises:
        ValueError: If there is no table.
    """
    if not tables:
        msg = "at least one table must be given (it tells which pairs lose anything): got none. Give weight errors."
        raise ValueError(msg)
    lossy = candidates.allowed & np.any([table > 0.0 for table in tables.values()], axis=0)
    columns = {f"log {name}": _safe_log(table) for name, table in tables.items()}
    columns |= {f"log {name}": _safe_log(score)[:, None] for name, score in (scores or {}).items()}
    columns |= _format_columns(candidates) | _unit_columns(candidates)
    values = np.stack([np.broadcast_to(column, lossy.shape) for column in columns.values()], axis=-1)
    return Features(names=tuple(columns), values=values, lossy=lossy)


def fit_predictor(features: Features, measured: LossTable, *, folds: int = 5, seed: int = 0) -> Predictor:
    """Returns the predictor fitted to the pairs with a positive measured loss.

    Args:
        features: Of all candidates.
        measured: Losses [U, F] in nats per token; completed pairs and losses that are not positive take no part.
        folds: Folds of the cross-validation and of the nested one.
        seed: Seed of the folds.

    Raises:
        ValueError: If the measured losses are not in nats per token, or too few units are measured.
    """
    unit_index, format_index = np.nonzero(features.lossy & find_measured_pairs(measured, features.lossy.shape))
    X, y = features.values[unit_index, format_index], np.log(measured.loss[unit_index, format_index])

    def choose(rows: _Rows) -> Callable[[_Rows], _Float]:
        strength = _choose_strength(X[rows], y[rows], unit_index[rows], folds, seed)
        return _ridge(X, y, strength)(rows)

    log_predicted = predict_out_of_fold(assign_folds(unit_index, folds, seed), choose)
    predicted = np.zeros(features.lossy.shape)
    predicted[unit_index, format_index] = np.exp(log_predicted)
    strength = _choose_strength(X, y, unit_index, folds, seed)
    mean, deviation, coefficients, covariance = _solve(X, y, strength)
    return Predictor(
        names=features.names,
        coefficients=coefficients,
        intercept=float(y.mean()),
        mean=mean,
        deviation=deviation,
        covariance=covariance,
        strength=strength,
        error=judge(y, log_predicted, folds),
        predicted=predicted,
    )


def predict_loss(predictor: Predictor, features: Features) -> LossTable:
    """Returns the predicted losses [U, F] and their standard errors; zero where nothing is lost.

    Args:
        predictor: Fitted.
        features: With the same names.

    Raises:
        ValueError: If the features are others.
    """
    if features.names != predictor.names:
        msg = (
            f"features must be those of the fit: got {', '.join(features.names)}; fitted to "
            f"{', '.join(predictor.names)}. Build them from the same tables, scores and roles."
        )
        raise ValueError(msg)
    X = (features.values - predictor.mean) / predictor.deviation
    loss = np.where(features.lossy, np.exp(predictor.intercept + X @ predictor.coefficients), 0.0)
    leverage = np.einsum("ufp,pq,ufq->uf", X, predictor.covariance, X)
    deviation = predictor.error.log_deviation * np.sqrt(1.0 + 1.0 / predictor.error.pair_count + leverage)
    return LossTable(loss=loss, std_error=loss * deviation, unit_of_measure=NATS)


def _format_columns(candidates: Candidates) -> dict[str, _Float]:
    formats = candidates.formats
    # A channel format's group is the row; one number larger than all group sizes stands for it.
    return {
        "bits": np.array([float(f.bits) for f in formats]),
        "log2 group size": np.array([np.log2(f.group_size or 4096) for f in formats]),
        "symmetric": np.array([float(f.symmetric) for f in formats]),
    }


def _unit_columns(candidates: Candidates) -> dict[str, _Float]:
    units = candidates.units
    deepest = max((unit.layer_index or 0 for unit in units), default=0) or 1
    depth = np.array([(unit.layer_index or 0) / deepest for unit in units])[:, None]
    roles = sorted({unit.role for unit in units})
    return {
        "relative depth": depth,
        "relative depth squared": depth**2,
        "log weight count": np.log([[unit.weight_count] for unit in units]),
        **{f"role {role}": np.array([[float(unit.role == role)] for unit in units]) for role in roles},
    }


def _safe_log(table: _Float) -> _Float:
    # Zero in one table where another sees an error (an expert that no token visited): no less than the least.
    positive = table[np.isfinite(table) & (table > 0.0)]
    least = positive.min() if positive.size else 1.0
    logs: _Float = np.log(np.maximum(np.nan_to_num(table, nan=least, posinf=least), least))
    return logs


def _choose_strength(X: _Float, y: _Float, unit_index: NDArray[np.int64], folds: int, seed: int) -> float:
    fold = assign_folds(unit_index, folds, seed)
    errors = {s: judge(y, predict_out_of_fold(fold, _ridge(X, y, s)), folds).log_deviation for s in STRENGTHS}
    return min(STRENGTHS, key=lambda strength: errors[strength])


def _ridge(X: _Float, y: _Float, strength: float) -> Callable[[_Rows], Callable[[_Rows], _Float]]:
    def fit(rows: _Rows) -> Callable[[_Rows], _Float]:
        mean, deviation, coefficients, _ = _solve(X[rows], y[rows], strength)
        intercept = y[rows].mean()
        return lambda others: intercept + (X[others] - mean) / deviation @ coefficients

    return fit


def _solve(X: _Float, y: _Float, strength: float) -> tuple[_Float, _Float, _Float, _Float]:
    mean, deviation = X.mean(axis=0), X.std(axis=0)
    # A feature that is the same for all pairs says nothing, and its coefficient is zero.
    deviation = np.where(deviation > 1e-12 * (1.0 + np.abs(mean)), deviation, np.inf)
    standard = (X - mean) / deviation
    covariance = np.linalg.inv(standard.T @ standard + strength * np.eye(X.shape[1]))
    return mean, deviation, covariance @ (standard.T @ (y - y.mean())), covariance
