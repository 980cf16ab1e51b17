"""The predictor on log-linear truths, its ridge against least squares, and its errors against the noise put in."""

import dataclasses

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.candidates import Candidates, list_candidates
from runtime.units import Unit, Weight
from sensitivity.prediction.predictor import Features, build_features, fit_predictor, predict_loss
from sensitivity.profile import NATS, LossTable

FORMATS = ("int2_g64", "int3_g64", "int4_g32_sym", "int4_channel", "int8_g64", "bf16")
ROLES = ("q_proj", "o_proj", "down_proj")
EFFECT = {"q_proj": 0.0, "o_proj": 1.0, "down_proj": -0.7}
LAYERS = 25


def make_candidates(layers: int = LAYERS) -> Candidates:
    units = [
        Unit(
            name=f"layers.{k}.{role}",
            weights=(
                Weight(parameter=f"layers.{k}.{role}.weight", expert_index=None, shape=(64 << i, 128), kind="linear"),
            ),
            role=role,
            layer_index=k,
            expert_index=None,
            kind="linear",
        )
        for k in range(layers)
        for i, role in enumerate(ROLES)
    ]
    return list_candidates(units, FORMATS, pins={r"layers\.1\.q_proj": "int8_g64"})


def make_error(candidates: Candidates, seed: int = 0) -> NDArray[np.float64]:
    """Returns relative errors, with the last format lossless."""
    rng = np.random.default_rng(seed)
    bits = np.array([float(f.bits) for f in candidates.formats])
    error = 4.0**-bits * np.exp(rng.normal(scale=0.8, size=(len(candidates.units), 1)))
    error[:, -1] = 0.0
    return np.where(candidates.allowed, error, 0.0)


def make_features(candidates: Candidates) -> Features:
    kurtosis = 3.0 * np.exp(np.random.default_rng(7).normal(scale=0.3, size=len(candidates.units)))
    return build_features(candidates, {"relative error": make_error(candidates)}, {"kurtosis": kurtosis})


def make_truth(features: Features, candidates: Candidates, noise: float = 0.0) -> LossTable:
    """Returns losses whose logarithm is linear in the features, with noise of a known deviation."""
    column = dict(zip(features.names, np.moveaxis(features.values, -1, 0), strict=True))
    log_loss = 0.9 * column["log relative error"] + 0.5 * column["log kurtosis"] - 2.0 * column["relative depth"]
    log_loss += np.array([EFFECT[unit.role] for unit in candidates.units])[:, None] - 1.0
    log_loss = log_loss + np.random.default_rng(9).normal(scale=noise, size=log_loss.shape)
    loss = np.where(features.lossy, np.exp(log_loss), 0.0)
    return LossTable(loss=loss, std_error=np.zeros_like(loss), unit_of_measure=NATS)


def test_features_say_what_they_are_called() -> None:
    candidates = make_candidates()
    features = make_features(candidates)
    assert features.values.shape == (*candidates.allowed.shape, len(features.names))
    column = dict(zip(features.names, np.moveaxis(features.values, -1, 0), strict=True))
    unit, format_ = 4, 2  # layers.1.o_proj at int4_g32_sym
    assert column["bits"][unit, format_] == 4.0
    assert column["log2 group size"][unit, format_] == 5.0
    assert column["symmetric"][unit, format_] == 1.0
    assert column["symmetric"][unit, 0] == 0.0
    assert column["relative depth"][unit, format_] == pytest.approx(1 / (LAYERS - 1))
    assert [column[f"role {role}"][unit, format_] for role in ROLES] == [0.0, 1.0, 0.0]
    assert column["log weight count"][unit, format_] == pytest.approx(np.log(128 * 128))
    assert column["log relative error"][unit, format_] == pytest.approx(np.log(make_error(candidates)[unit, format_]))
    np.testing.assert_array_equal(features.lossy, make_error(candidates) > 0.0)
    assert np.isfinite(features.values).all()


def test_a_log_linear_truth_is_predicted_for_units_not_seen() -> None:
    candidates = make_candidates()
    features = make_features(candidates)
    truth = make_truth(features, candidates)
    predictor = fit_predictor(features, truth)
    assert predictor.error.r2 > 0.9999
    assert predictor.strength == min(predictor.strength, 0.01)
    np.testing.assert_allclose(predict_loss(predictor, features).loss, truth.loss, rtol=0.02)
    np.testing.assert_allclose(predictor.predicted, truth.loss, rtol=0.05)
    # Some units only are measured: the others are predicted as well.
    some = np.where(np.arange(len(candidates.units))[:, None] % 2 == 0, truth.loss, 0.0)
    half = fit_predictor(features, dataclasses.replace(truth, loss=some))
    np.testing.assert_allclose(predict_loss(half, features).loss, truth.loss, rtol=0.05)
    assert not half.predicted[1::2].any()


def test_ridge_is_the_least_squares_solution_of_the_augmented_system() -> None:
    candidates = make_candidates()
    features = make_features(candidates)
    measured = make_truth(features, candidates, noise=0.5)
    predictor = fit_predictor(features, measured)
    rows = features.lossy
    X = (features.values[rows] - features.values[rows].mean(axis=0)) / predictor.deviation
    y = np.log(measured.loss[rows])
    ridge = np.sqrt(predictor.strength) * np.eye(X.shape[1])
    solution, *_ = np.linalg.lstsq(
        np.vstack([X, ridge]), np.concatenate([y - y.mean(), np.zeros(X.shape[1])]), rcond=None
    )
    np.testing.assert_allclose(predictor.coefficients, solution, rtol=1e-6, atol=1e-9)
    assert predictor.intercept == pytest.approx(y.mean())


def test_standard_errors_cover_new_units() -> None:
    candidates = make_candidates()
    features = make_features(candidates)
    noise = 0.4
    measured = make_truth(features, candidates, noise=noise)
    seen = np.arange(len(candidates.units))[:, None] < 50
    predictor = fit_predictor(features, dataclasses.replace(measured, loss=np.where(seen, measured.loss, 0.0)))
    assert predictor.error.log_deviation == pytest.approx(noise, rel=0.2)
    assert predictor.error.median_factor == pytest.approx(np.exp(0.6745 * noise), rel=0.15)
    table = predict_loss(predictor, features)
    new = features.lossy & ~seen
    deviations = np.log(measured.loss[new] / table.loss[new]) / (table.std_error[new] / table.loss[new])
    # 95 % of a normal law lie within two deviations; some hundred pairs, units further in depth than any fitted.
    assert np.mean(np.abs(deviations) < 2.0) > 0.85
    # A prediction is never surer than a single observation.
    assert np.all(table.std_error[features.lossy] >= predictor.error.log_deviation * table.loss[features.lossy])


def test_no_unit_takes_part_in_its_own_prediction() -> None:
    candidates = make_candidates()
    features = make_features(candidates)
    measured = make_truth(features, candidates, noise=0.3)
    changed = measured.loss.copy()
    changed[10] *= 1000.0
    before = fit_predictor(features, measured).predicted
    after = fit_predictor(features, dataclasses.replace(measured, loss=changed)).predicted
    np.testing.assert_allclose(after[10], before[10], rtol=1e-12)
    assert np.any(after[11] != before[11])


def test_what_loses_nothing_is_predicted_to_lose_nothing() -> None:
    candidates = make_candidates()
    features = make_features(candidates)
    table = predict_loss(fit_predictor(features, make_truth(features, candidates)), features)
    assert not table.loss[~features.lossy].any() and not table.std_error[~features.lossy].any()
    assert np.all(table.loss[features.lossy] > 0)
    assert table.unit_of_measure == NATS


def test_a_table_that_sees_no_error_where_another_does() -> None:
    candidates = make_candidates(2)
    error = make_error(candidates)
    output_error = error.copy()
    output_error[3] = 0.0  # an expert that no token visited
    score = np.full(len(candidates.units), 2.0)
    score[0] = np.nan
    features = build_features(candidates, {"weight": error, "output": output_error}, {"score": score})
    np.testing.assert_array_equal(features.lossy, error > 0.0)
    column = dict(zip(features.names, np.moveaxis(features.values, -1, 0), strict=True))
    np.testing.assert_allclose(column["log output"][3], np.log(output_error[output_error > 0].min()))
    np.testing.assert_allclose(column["log score"], np.log(2.0))


def test_completed_pairs_take_no_part() -> None:
    candidates = make_candidates()
    features = make_features(candidates)
    truth = make_truth(features, candidates)
    seen = np.random.default_rng(2).random(truth.loss.shape) < 0.5
    completed = LossTable(
        loss=np.where(seen, truth.loss, 1.0), std_error=truth.std_error, unit_of_measure=NATS, measured=seen
    )
    predictor = fit_predictor(features, completed)
    np.testing.assert_allclose(predict_loss(predictor, features).loss, truth.loss, rtol=0.05)
    np.testing.assert_array_equal(predictor.predicted > 0.0, seen & features.lossy)


def test_wrong_tables_are_refused() -> None:
    candidates = make_candidates()
    features = make_features(candidates)
    measured = make_truth(features, candidates)
    with pytest.raises(ValueError, match="at least one table must be given"):
        build_features(candidates, {})
    with pytest.raises(ValueError, match=r"measured losses must be in nats/token and of shape .*: got squared error"):
        fit_predictor(features, dataclasses.replace(measured, unit_of_measure="squared error"))
    with pytest.raises(ValueError, match=r"measured losses must be .* of shape \(75, 6\): got nats/token, \(74, 6\)"):
        fit_predictor(features, dataclasses.replace(measured, loss=measured.loss[1:]))
    predictor = fit_predictor(features, measured)
    other = build_features(candidates, {"another error": make_error(candidates)})
    with pytest.raises(ValueError, match="features must be those of the fit: got log another error"):
        predict_loss(predictor, other)
