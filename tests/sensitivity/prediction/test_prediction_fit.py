"""The fitted correction: exact laws are recovered, errors are those of plans left out, draws span the sizes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensitivity.prediction.prediction_fit import LEAST_BITS, MOST_BITS, draw_choices, fit_predictions


@given(factor=st.floats(0.01, 100), exponent=st.floats(0.3, 3.0), seed=st.integers(0, 99))
def test_an_exact_power_law_is_recovered(factor: float, exponent: float, seed: int) -> None:
    predicted = np.random.default_rng(seed).uniform(0.01, 2.0, size=9)
    fit = fit_predictions(predicted, factor * predicted**exponent)
    assert fit.factor == pytest.approx(factor, rel=1e-9)
    assert fit.exponent == pytest.approx(exponent, rel=1e-9)
    assert fit.log_error == pytest.approx(0.0, abs=1e-9)
    assert fit.error_factor == pytest.approx(1.0, abs=1e-9)
    assert fit.correct(0.5) == pytest.approx(factor * 0.5**exponent)
    assert fit.invert(fit.correct(0.37)) == pytest.approx(0.37)


def test_the_error_is_that_of_plans_left_out() -> None:
    rng = np.random.default_rng(1)
    predicted = rng.uniform(0.02, 1.5, size=12)
    measured = 1.1 * predicted**1.05 * rng.lognormal(sigma=0.2, size=12)
    errors = []
    for i in range(12):
        kept = np.arange(12) != i
        without = fit_predictions(predicted[kept], measured[kept])
        errors.append(np.log(measured[i] / without.correct(predicted[i])))
    assert fit_predictions(predicted, measured).log_error == pytest.approx(np.sqrt(np.mean(np.square(errors))))


@pytest.mark.parametrize(
    ("predicted", "measured"),
    [([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]), ([0.1, 0.2, 0.3, 0.0], [0.1] * 4), ([0.1] * 4, [0.1] * 4), ([], [])],
)
def test_too_little_to_fit_is_refused(predicted: list[float], measured: list[float]) -> None:
    with pytest.raises(ValueError, match="at least 4 plans with positive losses that differ"):
        fit_predictions(np.array(predicted), np.array(measured))


def test_a_falling_law_is_refused() -> None:
    predicted = np.array([0.1, 0.2, 0.4, 0.8])
    with pytest.raises(ValueError, match="must rise with the prediction"):
        fit_predictions(predicted, 1.0 / predicted)


def _tables(units: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    bits = np.array([2.25, 3.25, 4.25, 5.25, 6.25, 8.25, 16.0])
    weights = rng.integers(1000, 5000, size=units).astype(float)
    loss = rng.lognormal(sigma=1.0, size=(units, 1)) * 4.0 ** -bits[None]
    return loss, bits[None] * weights[:, None] / 8, np.ones((units, 7), dtype=bool), weights


def test_the_draws_span_the_sizes_and_half_of_them_are_optimal() -> None:
    loss, stored, allowed, weights = _tables(60, 0)
    choices = draw_choices(loss, stored, allowed, weights, count=10, seed=3)
    units = np.arange(60)
    sizes = np.array([stored[units, choice].sum() * 8 / weights.sum() for choice in choices])
    targets = np.linspace(LEAST_BITS, MOST_BITS, 10)
    # One step of one unit of at most 5000 weights by at most 7.75 bits is the coarseness of a plan's size.
    assert np.all(sizes <= targets + 1e-9)
    assert np.all(targets - sizes <= 3 * 5000 * 7.75 / weights.sum())
    for choice in choices[::2]:
        # Optimal for its own size: no swap of two units' formats saves loss at equal or fewer bytes.
        own_loss, own_bytes = loss[units, choice], stored[units, choice]
        gain, cost = own_loss[:, None] - loss, stored - own_bytes[:, None]
        down = cost < 0
        assert np.max(gain[~down & (cost > 0)] / cost[~down & (cost > 0)]) <= np.min(gain[down] / cost[down]) + 1e-12
    assert np.array_equal(choices, draw_choices(loss, stored, allowed, weights, count=10, seed=3))


def test_forbidden_formats_are_never_drawn_and_small_menus_do() -> None:
    loss, stored, allowed, weights = _tables(20, 1)
    allowed[:, 1::2] = False
    allowed[3] = np.arange(7) == 4
    # As cost tables have it.
    stored[~allowed] = np.nan
    choices = draw_choices(loss, stored, allowed, weights, count=6, seed=0)
    assert all(allowed[np.arange(20), choice].all() for choice in choices)
    assert np.all(choices[:, 3] == 4)
    least = draw_choices(loss[:, 5:], stored[:, 5:], np.ones((20, 2), bool), weights, count=2, seed=0)
    assert np.array_equal(least, np.zeros((2, 20)))
