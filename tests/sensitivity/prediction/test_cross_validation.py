"""Folds by unit, predictions of units not seen, and the figures of a known error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensitivity.prediction.cross_validation import assign_folds, judge, predict_out_of_fold


@given(units=st.integers(2, 40), folds=st.integers(2, 6), seed=st.integers(0, 100))
def test_a_unit_is_in_one_fold_and_folds_are_even(units: int, folds: int, seed: int) -> None:
    folds = min(folds, units)
    unit_index = np.repeat(np.arange(units) * 7, 3)
    fold = assign_folds(unit_index, folds, seed)
    by_unit = fold.reshape(units, 3)
    assert (by_unit == by_unit[:, :1]).all()
    sizes = np.bincount(by_unit[:, 0], minlength=folds)
    assert len(sizes) == folds and sizes.max() - sizes.min() <= 1
    np.testing.assert_array_equal(assign_folds(unit_index, folds, seed), fold)


@pytest.mark.parametrize(("units", "folds"), [(3, 4), (1, 2), (5, 1)])
def test_impossible_folds_are_refused(units: int, folds: int) -> None:
    with pytest.raises(ValueError, match=f"folds must be from 2 to .* got folds={folds}, {units} units"):
        assign_folds(np.arange(units), folds, 0)


def test_no_row_takes_part_in_its_own_prediction() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    fold = np.array([0, 0, 1, 1, 2])
    predicted = predict_out_of_fold(fold, lambda seen: lambda rows: np.full(rows.sum(), values[seen].sum()))
    np.testing.assert_array_equal(predicted, [28.0, 28.0, 19.0, 19.0, 15.0])


def test_figures_of_a_known_error() -> None:
    log_loss = np.array([0.0, 2.0, 4.0, 6.0])
    error = judge(log_loss, log_loss + np.array([1.0, -1.0, 1.0, -1.0]) * np.log(2.0), 5)
    assert error.median_factor == pytest.approx(2.0)
    assert error.log_deviation == pytest.approx(np.log(2.0))
    assert error.r2 == pytest.approx(1.0 - 4 * np.log(2.0) ** 2 / 20.0)
    assert str(error) == "R2 0.904, half within a factor of 2.00 (5 folds of units, 4 pairs)"
    assert judge(log_loss, np.full(4, log_loss.mean()), 2).r2 == pytest.approx(0.0)


def test_r2_of_losses_that_are_all_one() -> None:
    assert judge(np.ones(3), np.ones(3), 2).r2 == 1.0
    assert judge(np.ones(3), np.zeros(3), 2).r2 == 0.0
