"""BAQ's identities to rounding, and the edges of its water-filling."""

import numpy as np
import pytest

from solvers import Termination, solve
from solvers.equal_loss import allocate_bits, build_bit_problem, predict_gain, round_to_bits, round_to_levels

EXACT = 1e-12


def draw_coefficients(n_units: int, *, spread: float, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.random.default_rng(seed).lognormal(0.0, spread, n_units)


@pytest.mark.parametrize("decay", [2.0, 1.95])
def test_equal_loss_and_gain_where_nothing_is_held(decay: float) -> None:
    coefficient = draw_coefficients(500, spread=0.5)
    plan = allocate_bits(coefficient, mean_bits=4.0, decay=decay)
    assert not plan.held.any()
    geometric = np.exp(np.log(coefficient).mean())
    # Equal loss: c 2^(-dR) = GM 2^(-d Rbar) for all units.
    np.testing.assert_allclose(plan.loss, geometric * 2.0 ** (-decay * 4.0), rtol=EXACT)
    np.testing.assert_allclose(plan.bits, 4.0 + np.log2(coefficient / geometric) / decay, atol=EXACT)
    assert plan.bits.mean() == pytest.approx(4.0, abs=EXACT)
    assert plan.level == pytest.approx(plan.loss[0], rel=EXACT)
    # Gain: GM / AM.
    assert plan.gain == pytest.approx(geometric / coefficient.mean(), rel=EXACT)
    assert predict_gain(coefficient) == pytest.approx(plan.gain, rel=EXACT)


def test_units_of_unequal_size_lose_the_same_per_weight() -> None:
    coefficient = draw_coefficients(300, spread=0.7)
    n_weights = np.random.default_rng(1).integers(10, 1000, 300).astype(np.float64)
    plan = allocate_bits(coefficient * n_weights, mean_bits=5.0, n_weights=n_weights)
    np.testing.assert_allclose(plan.loss / n_weights, plan.level, rtol=EXACT)
    assert n_weights @ plan.bits == pytest.approx(5.0 * n_weights.sum(), rel=EXACT)
    assert predict_gain(coefficient * n_weights, n_weights=n_weights) == pytest.approx(plan.gain, rel=EXACT)


@pytest.mark.parametrize("most_bits", [np.inf, 5.0])
@pytest.mark.parametrize("mean_bits", [0.3, 2.0, 3.5])
def test_water_filling_satisfies_its_optimality_conditions(mean_bits: float, most_bits: float) -> None:
    coefficient = draw_coefficients(400, spread=3.0)
    plan = allocate_bits(coefficient, mean_bits=mean_bits, most_bits=most_bits)
    assert plan.bits.mean() == pytest.approx(mean_bits, abs=EXACT)
    assert plan.held.any()
    free, empty, full = ~plan.held, plan.bits == 0.0, plan.bits == most_bits
    np.testing.assert_allclose(plan.loss[free], plan.level, rtol=EXACT)
    assert np.all(plan.loss[empty] <= plan.level * (1 + EXACT))
    assert np.all(plan.loss[full] >= plan.level * (1 - EXACT))
    # Held units cost some of the gain that the geometric mean promises.
    assert predict_gain(coefficient) <= plan.gain <= 1.0


@pytest.mark.parametrize("mean_bits", [0.0, 6.0])
def test_mean_at_an_edge_puts_every_unit_there(mean_bits: float) -> None:
    plan = allocate_bits(draw_coefficients(7, spread=2.0), mean_bits=mean_bits, most_bits=6.0)
    np.testing.assert_allclose(plan.bits, mean_bits, atol=EXACT)
    assert plan.gain == pytest.approx(1.0, rel=EXACT)


def test_whole_bits_lie_between_continuous_and_uniform_and_are_optimal() -> None:
    coefficient = draw_coefficients(60, spread=2.0)
    continuous = allocate_bits(coefficient, mean_bits=3.0)
    bits = round_to_bits(coefficient, mean_bits=3.0, most_bits=8)
    loss = float(np.sum(coefficient * 4.0**-bits))
    assert bits.mean() <= 3.0
    assert continuous.loss.sum() <= loss <= coefficient.sum() * 4.0**-3.0
    problem = build_bit_problem(coefficient, format_bits=np.arange(9.0), mean_bits=3.0)
    exact = solve(problem)
    assert exact.termination is Termination.OPTIMAL
    assert loss == pytest.approx(exact.objective, rel=1e-9)


def test_whole_bits_of_unequal_units_keep_the_mean() -> None:
    coefficient, n_weights = draw_coefficients(40, spread=1.0), np.arange(1.0, 41.0)
    bits = round_to_bits(coefficient, mean_bits=3.0, n_weights=n_weights, least_bits=1, most_bits=5)
    assert n_weights @ bits <= 3.0 * n_weights.sum()
    assert (bits.min(), bits.max()) >= (1.0, 1.0)
    assert bits.max() <= 5.0
    problem = build_bit_problem(coefficient, format_bits=np.arange(1.0, 6.0), mean_bits=3.0, n_weights=n_weights)
    continuous = allocate_bits(coefficient, mean_bits=3.0, n_weights=n_weights, least_bits=1.0, most_bits=5.0)
    exact = solve(problem)
    assert continuous.loss.sum() <= exact.objective <= float(np.sum(coefficient * 4.0**-bits))


def test_levels_are_rounded_as_published() -> None:
    # Three levels are 1.585 bits; nothing falls below one level.
    np.testing.assert_allclose(round_to_levels(np.array([1.5, 0.1, -3.0])), [np.log2(3), 0.0, 0.0], atol=EXACT)


def test_bad_arguments_are_refused() -> None:
    coefficient = np.array([1.0, 2.0])
    with pytest.raises(ValueError, match="coefficient must be above 0: got coefficient=0.0"):
        allocate_bits(np.array([0.0, 1.0]), mean_bits=3.0)
    with pytest.raises(ValueError, match="n_weights must be above 0"):
        predict_gain(coefficient, n_weights=np.array([1.0, -1.0]))
    with pytest.raises(ValueError, match="decay must be above 0"):
        build_bit_problem(coefficient, format_bits=np.array([2.0]), mean_bits=2.0, decay=0.0)
    with pytest.raises(ValueError, match="mean_bits must be from 2.0 to 6.0: got mean_bits=1.0"):
        allocate_bits(coefficient, mean_bits=1.0, least_bits=2.0, most_bits=6.0)
    with pytest.raises(ValueError, match="mean_bits must be at least 2: got mean_bits=1.0"):
        round_to_bits(coefficient, mean_bits=1.0, least_bits=2)
