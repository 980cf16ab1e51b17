"""Conversions of power laws and step functions that are known exactly."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sensitivity.prediction.conversion import convert, fit_conversion
from sensitivity.profile import NATS, LossTable

U, F = 60, 5


def make_criterion(seed: int = 0) -> NDArray[np.float64]:
    criterion = np.exp(np.random.default_rng(seed).normal(scale=3.0, size=(U, F)))
    criterion[:, -1] = 0.0  # a lossless format
    return criterion


def make_table(loss: NDArray[np.float64]) -> LossTable:
    return LossTable(loss=loss, std_error=np.zeros_like(loss), unit_of_measure=NATS)


@pytest.mark.parametrize("monotone", [False, True])
def test_a_power_law_is_found(monotone: bool) -> None:
    criterion = make_criterion()
    measured = make_table(0.02 * criterion**1.3)
    conversion = fit_conversion(criterion, measured, monotone=monotone)
    assert conversion.slope == pytest.approx(1.3, rel=1e-9)
    assert conversion.intercept == pytest.approx(np.log(0.02), rel=1e-9)
    assert conversion.error.pair_count == U * (F - 1)
    assert conversion.error.r2 > 0.999
    np.testing.assert_allclose(convert(conversion, criterion).loss, measured.loss, rtol=1e-9)
    # Beyond the fitted range the line goes on; zero stays zero.
    far = np.array([[1e-9, 1e9, 0.0]])
    np.testing.assert_allclose(convert(conversion, far).loss, 0.02 * far**1.3, rtol=1e-6)


def test_error_is_that_of_the_noise() -> None:
    criterion = make_criterion()
    noise = np.random.default_rng(1).normal(scale=0.5, size=(U, F))
    conversion = fit_conversion(criterion, make_table(criterion * np.exp(noise)))
    # Half of a normal law lies within 0.6745 deviations; 240 samples.
    assert conversion.error.median_factor == pytest.approx(np.exp(0.6745 * 0.5), rel=0.1)
    assert conversion.error.log_deviation == pytest.approx(0.5, rel=0.15)
    table = convert(conversion, criterion)
    np.testing.assert_allclose(table.std_error, table.loss * conversion.error.log_deviation)
    assert table.unit_of_measure == NATS
    assert conversion.slope == pytest.approx(1.0, abs=0.05)
    assert str(conversion).startswith(f"loss = {np.exp(conversion.intercept):.3g} x criterion^{conversion.slope:.2f}, ")
    assert str(conversion).endswith(f"a straight line: {conversion.error}")


def test_a_bent_law_is_better_monotone() -> None:
    criterion = make_criterion()
    bent = make_table(np.where(criterion > 0, np.minimum(criterion, 1.0) ** 2, 0.0))
    line, monotone = (fit_conversion(criterion, bent, monotone=m) for m in (False, True))
    assert monotone.error.median_factor < 1.05
    assert line.error.median_factor > 2.0
    assert monotone.error.r2 > line.error.r2
    assert "monotone in" in str(monotone)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), monotone=st.booleans())
def test_order_is_kept(seed: int, monotone: bool) -> None:
    rng = np.random.default_rng(seed)
    criterion = np.exp(rng.normal(size=(12, 3)))
    measured = make_table(criterion * np.exp(rng.normal(scale=0.7, size=(12, 3))))
    conversion = fit_conversion(criterion, measured, monotone=monotone, folds=3)
    loss = convert(conversion, np.geomspace(1e-4, 1e4, 300)[None]).loss[0]
    steps = np.diff(loss) * np.sign(conversion.slope)
    assert np.all(steps >= (0.0 if not monotone else -1e-12))


@settings(deadline=None, max_examples=30)
@given(exponent=st.floats(-20, 20))
def test_unit_of_the_criterion_does_not_matter(exponent: float) -> None:
    criterion = make_criterion(3)
    measured = make_table(criterion**0.8 * np.exp(np.random.default_rng(4).normal(size=(U, F))))
    plain, scaled = (fit_conversion(c, measured) for c in (criterion, criterion * np.exp(exponent)))
    assert scaled.slope == pytest.approx(plain.slope, rel=1e-6)
    assert scaled.error.r2 == pytest.approx(plain.error.r2, abs=1e-9)
    loss = convert(scaled, criterion * np.exp(exponent)).loss
    np.testing.assert_allclose(loss, convert(plain, criterion).loss, rtol=1e-6)


def test_a_criterion_that_says_nothing_explains_nothing() -> None:
    criterion = np.ones((U, F))
    measured = make_table(np.exp(np.random.default_rng(0).normal(size=(U, F))))
    conversion = fit_conversion(criterion, measured)
    assert conversion.slope == 0.0
    assert conversion.error.r2 < 0.05


def test_completed_pairs_take_no_part() -> None:
    criterion = make_criterion()
    seen = np.arange(U)[:, None] % 2 == np.arange(F) % 2
    measured = make_table(np.where(seen, criterion, 100.0))
    conversion = fit_conversion(criterion, dataclasses.replace(measured, measured=seen))
    assert conversion.slope == pytest.approx(1.0)
    assert conversion.error.pair_count == np.sum(seen & (criterion > 0))
    assert fit_conversion(criterion, measured).slope < 0.9


def test_tables_that_cannot_be_compared_are_refused() -> None:
    criterion = make_criterion()
    measured = make_table(criterion)
    with pytest.raises(ValueError, match=r"measured losses must be in nats/token and of shape .*: got squared error"):
        fit_conversion(criterion, dataclasses.replace(measured, unit_of_measure="squared error"))
    with pytest.raises(ValueError, match=r"measured losses must be .* of shape \(59, 5\): got nats/token, \(60, 5\)"):
        fit_conversion(criterion[1:], measured)
    with pytest.raises(ValueError, match="folds must be from 2 to the number of measured units"):
        fit_conversion(np.where(np.arange(U)[:, None] < 3, criterion, 0.0), measured)
