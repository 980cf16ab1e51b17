"""Tables and the quadratic form out of known marginals."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.candidates import Candidates, list_candidates
from runtime.units import find_units
from sensitivity.interactions.shapley import ShapleyConfig, ShapleyMarginals
from sensitivity.interactions.shapley_table import build_shapley_matrix, extend_table, find_factors, pair_table
from sensitivity.profile import NATS, LossTable
from solvers.pairwise import project_pairwise
from tests.tiny_models import build_tiny_llama

FORMATS = ("int2_g64", "int3_g64", "int4_g64", "bf16")
INT2, INT3, INT4, BF16 = range(4)
CONFIG = ShapleyConfig(start_format="int4_g64", target_format="int2_g64", permutations=4, antithetic=False)


@pytest.fixture(scope="module")
def candidates() -> Candidates:
    """Embedding, four linear layers and the head; embedding and head may not have 2 bits, and the head not 4."""
    units = [unit for unit in find_units(build_tiny_llama()) if unit.role in ("embed_tokens", "o_proj", "lm_head")]
    found = list_candidates(units, FORMATS, pins={"lm_head": "bf16"})
    assert found.allowed.tolist() == [[False, False, True, True], [True] * 4, [True] * 4, [False, False, False, True]]
    return found


def make_marginals(first: list[float], second: list[float]) -> ShapleyMarginals:
    """Returns the marginals of two players: one value for each permutation, both sequences alike."""
    marginal = np.repeat(np.array([first, second]).T[:, None], 2, axis=1)
    return ShapleyMarginals(
        config=CONFIG,
        players=np.array([1, 2]),
        start_kl=np.array([0.25, 0.25]),
        orders=np.tile([1, 2], (len(first), 1)),
        marginal=marginal,
    )


MARGINALS = make_marginals([1.0, 3.0, 1.0, 3.0], [6.0, 2.0, 6.0, 2.0])


def make_base(loss: list[list[float]]) -> LossTable:
    return LossTable(loss=np.array(loss), std_error=np.full((4, 4), 0.1), unit_of_measure="squared weight")


BASE = make_base([[0, 0, 8, 0], [10, 4, 2, 0], [5, 2, 1, 0], [0, 0, 0, 6]])


def test_pair_table_is_the_values_over_the_start(candidates: Candidates) -> None:
    table, allowed = pair_table(MARGINALS, candidates)
    assert table.unit_of_measure == NATS
    assert np.argwhere(allowed).tolist() == [[0, INT4], [1, INT2], [1, INT4], [2, INT2], [2, INT4], [3, BF16]]
    expected = np.zeros((4, 4))
    expected[1, INT2], expected[2, INT2] = 2.0, 4.0
    np.testing.assert_allclose(table.loss, expected)
    # Of four permutations: deviations of sqrt(4/3) and sqrt(16/3).
    np.testing.assert_allclose(table.std_error[[1, 2], INT2], [np.sqrt(1 / 3), np.sqrt(4 / 3)])
    assert np.count_nonzero(table.std_error) == 2


def test_rows_are_scaled_to_the_values(candidates: Candidates) -> None:
    np.testing.assert_allclose(find_factors(BASE, MARGINALS, candidates), np.array([np.nan, 2 / 8, 4 / 4, np.nan]))
    table = extend_table(BASE, MARGINALS, candidates)
    # The median of 1/4 and 1 for the units that are no players.
    expected = [[0, 0, 8 * 0.625, 0], [2.5, 1, 0.5, 0], [5, 2, 1, 0], [0, 0, 0, 6 * 0.625]]
    np.testing.assert_allclose(table.loss, expected)
    step = table.loss[[1, 2], INT2] - table.loss[[1, 2], INT4]
    np.testing.assert_allclose(step, MARGINALS.value)
    assert table.unit_of_measure == NATS
    # Relative errors of the values: sqrt(1/3) / 2 and sqrt(4/3) / 4.
    np.testing.assert_allclose(table.std_error[1], np.sqrt(1 / 3) / 2 * table.loss[1])
    np.testing.assert_allclose(table.std_error[2], np.sqrt(4 / 3) / 4 * table.loss[2])
    np.testing.assert_allclose(table.std_error[0], [0, 0, 0.0625, 0.0625])


def test_factor_cancels_the_units_of_the_base(candidates: Candidates) -> None:
    scaled = make_base((1000 * BASE.loss).tolist())
    expected = extend_table(BASE, MARGINALS, candidates)
    np.testing.assert_allclose(extend_table(scaled, MARGINALS, candidates).loss, expected.loss, rtol=1e-14)


@pytest.mark.parametrize(
    ("marginals", "base"),
    [
        (make_marginals([-1.0, 1.0, -3.0, 1.0], [6.0, 2.0, 6.0, 2.0]), BASE),
        (make_marginals([-1.0, 1.0, -1.0, 1.0], [6.0, 2.0, 6.0, 2.0]), BASE),
        (MARGINALS, make_base([[0, 0, 8, 0], [2, 4, 2, 0], [5, 2, 1, 0], [0, 0, 0, 6]])),
    ],
    ids=["negative_value", "value_of_zero", "flat_base"],
)
def test_row_without_a_factor_takes_the_median(
    candidates: Candidates, marginals: ShapleyMarginals, base: LossTable
) -> None:
    assert np.isnan(find_factors(base, marginals, candidates)[1])
    table = extend_table(base, marginals, candidates)
    np.testing.assert_allclose(table.loss[1], base.loss[1] * 1.0)
    np.testing.assert_allclose(table.std_error[1], 0.1)


def test_no_factor_at_all_is_refused(candidates: Candidates) -> None:
    with pytest.raises(ValueError, match="got none among 2 players"):
        extend_table(BASE, make_marginals([-1.0, -2.0, 0.0, 0.0], [-1.0] * 4), candidates)


def quadratic_form(q: NDArray[np.float64], shrinkage: float) -> float:
    """Returns a'q + q'Kq by the paper's formula, unit by unit."""
    K = MARGINALS.shrunk_covariance(shrinkage)
    total = 0.0
    for u in range(2):
        total += (MARGINALS.value[u] - sum(K[u, v] for v in range(2) if v != u)) * q[u]
        total += sum(K[u, v] * q[u] * q[v] for v in range(2))
    return total


@pytest.mark.parametrize("shrinkage", [0.0, 0.5, 1.0])
def test_matrix_is_the_papers_quadratic_form(candidates: Candidates, shrinkage: float) -> None:
    matrix = build_shapley_matrix(MARGINALS, candidates, shrinkage=shrinkage)
    for q in product((0.0, 1.0), repeat=2):
        x = np.zeros(16)
        x[0 * 4 + INT4] = x[3 * 4 + BF16] = 1.0
        for u, lowered in zip((1, 2), q, strict=True):
            x[u * 4 + (INT2 if lowered else INT4)] = 1.0
        assert x @ matrix @ x / 2 == pytest.approx(quadratic_form(np.array(q), shrinkage))
    sketch = project_pairwise(matrix, n_formats=4, allowed=candidates.allowed, keep_losses=True)
    assert sketch.loss.shape == (4, 4)


def test_bad_shrinkage_and_unknown_format_are_refused(candidates: Candidates) -> None:
    with pytest.raises(ValueError, match=r"between 0 and 1: got -0\.1"):
        build_shapley_matrix(MARGINALS, candidates, shrinkage=-0.1)
    other = replace(MARGINALS, config=replace(CONFIG, target_format="int5_g64"))
    with pytest.raises(ValueError, match="got 'int5_g64', candidates are"):
        pair_table(other, candidates)
