"""The geometric mean of two tables and its standard error."""

from dataclasses import replace

import numpy as np

from sensitivity.profile import NATS, LossTable
from sensitivity.sketches.combination import combine


def make_table(loss: float, std_error: float, shape: tuple[int, int] = (1, 1)) -> LossTable:
    return LossTable(loss=np.full(shape, loss), std_error=np.full(shape, std_error), unit_of_measure=NATS)


def test_loss_is_the_geometric_mean() -> None:
    a = LossTable(loss=np.array([[1.0, 4.0]]), std_error=np.zeros((1, 2)), unit_of_measure=NATS)
    b = LossTable(loss=np.array([[4.0, 9.0]]), std_error=np.zeros((1, 2)), unit_of_measure=NATS)
    combined = combine(a, b, np.ones((1, 2), dtype=bool))
    np.testing.assert_allclose(combined.loss, [[2.0, 6.0]], rtol=1e-15)
    assert not combined.std_error.any()
    assert combined.unit_of_measure == NATS


def test_std_error_is_that_of_a_simulation() -> None:
    a, b, relative_a, relative_b, count = 0.02, 0.05, 0.03, 0.05, 100_000
    combined = combine(make_table(a, a * relative_a), make_table(b, b * relative_b), np.ones((1, 1), dtype=bool))
    generator = np.random.default_rng(0)
    draws = np.sqrt(generator.normal(a, a * relative_a, count) * generator.normal(b, b * relative_b, count))
    # The deviation of n draws has a relative standard error of 1 / sqrt(2 n), of which five are allowed; the delta
    # method leaves out terms that are smaller by the square of the relative errors.
    tolerance = 5 / np.sqrt(2 * count) + 2 * relative_b**2
    np.testing.assert_allclose(combined.std_error, draws.std(), rtol=tolerance)


def test_order_does_not_matter() -> None:
    allowed = np.ones((2, 3), dtype=bool)
    a, b = make_table(0.1, 0.02, (2, 3)), make_table(0.3, 0.01, (2, 3))
    np.testing.assert_array_equal(combine(a, b, allowed).loss, combine(b, a, allowed).loss)
    np.testing.assert_array_equal(combine(a, b, allowed).std_error, combine(b, a, allowed).std_error)


def test_zero_and_negative_losses_and_forbidden_pairs_are_zero_without_error() -> None:
    loss = np.array([[0.0, -1e-9, 0.5, 0.5]])
    a = LossTable(loss=loss, std_error=np.array([[0.0, 1e-9, 0.1, 0.1]]), unit_of_measure=NATS)
    b = make_table(0.5, 0.1, (1, 4))
    with np.errstate(all="raise"):
        combined = combine(a, b, np.array([[True, True, True, False]]))
    np.testing.assert_allclose(combined.loss, [[0.0, 0.0, 0.5, 0.0]], rtol=1e-15)
    np.testing.assert_allclose(combined.std_error, [[0.0, 0.0, 0.05 * 2**0.5, 0.0]], rtol=1e-15)


def test_completed_losses_err_with_what_they_were_completed_from() -> None:
    allowed, measured = np.ones((1, 2), dtype=bool), np.array([[True, False]])
    a, b = make_table(0.2, 0.02, (1, 2)), replace(make_table(0.4, 0.08, (1, 2)), measured=measured)
    for combined in (combine(a, b, allowed), combine(b, a, allowed)):
        # Relative errors of 0.1 and 0.2: independent they add in squares, together as they are.
        loss = 0.08**0.5
        np.testing.assert_allclose(combined.std_error, [[loss * 0.5 * 0.05**0.5, loss * 0.15]], rtol=1e-12)
        np.testing.assert_array_equal(combined.measured, measured)
    both = combine(replace(a, measured=~measured), b, allowed)
    assert both.measured is not None and not both.measured.any()
    assert combine(a, a, allowed).measured is None
