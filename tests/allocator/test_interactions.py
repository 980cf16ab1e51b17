"""Cross terms: correlations of the sketch, norms of the loss, and a shrinkage that finds only what both halves see."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from allocator.interactions import SHRINKAGES, candidates_near, choose_shrinkage, quadratic_loss, sketch_from_gram
from solvers import AllocationProblem, solve

UNITS, FORMATS = 6, 3


def make_gram(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns inner products [U F, U F] of vectors [S, U, F]."""
    flat = vectors.reshape(vectors.shape[0], -1)
    return np.asarray(flat.T @ flat)


def test_sketch_has_the_correlations_of_the_gram_matrix_and_the_norms_of_the_loss() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(8, UNITS, FORMATS))
    loss = rng.uniform(0.1, 2.0, size=(UNITS, FORMATS))
    sketch = sketch_from_gram(make_gram(vectors), loss).astype(np.float64)
    np.testing.assert_allclose(0.5 * np.square(sketch).sum(axis=0), loss, rtol=2e-3)
    expected = np.corrcoef(np.concatenate([vectors, -vectors]).reshape(16, -1).T)
    norms = np.sqrt(2 * loss).ravel()
    # All but 0.05 % of the energy is kept: a correlation is off by at most the trace of what is dropped.
    dropped = 0.0005 * UNITS * FORMATS
    np.testing.assert_allclose(make_gram(sketch) / np.outer(norms, norms), expected, atol=dropped)
    assert sketch.dtype == np.float64 and sketch.shape[0] <= 8


def test_sketch_of_nothing_and_of_a_loss_below_zero_is_zero() -> None:
    gram = np.zeros((4, 4))
    assert not sketch_from_gram(gram, np.ones((2, 2))).any()
    sketch = sketch_from_gram(np.eye(4), np.array([[-1.0, 2.0], [0.0, 0.5]]))
    np.testing.assert_allclose(np.square(sketch).sum(axis=0), [[0, 4], [0, 1]], atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0])
def test_quadratic_loss_is_the_sum_over_all_pairs(scale: float) -> None:
    rng = np.random.default_rng(1)
    sketch = rng.normal(size=(5, UNITS, FORMATS)).astype(np.float32)
    loss = rng.uniform(size=(UNITS, FORMATS))
    choice = rng.integers(FORMATS, size=UNITS)
    expected = sum(loss[u, choice[u]] for u in range(UNITS))
    for u in range(UNITS):
        for v in range(u + 1, UNITS):
            a, b = sketch[:, u, choice[u]].astype(float), sketch[:, v, choice[v]].astype(float)
            expected += scale * float(a @ b)
    assert quadratic_loss(choice, loss, sketch, scale) == pytest.approx(expected, rel=1e-12)


def build(loss: NDArray[np.float64], sketch: NDArray[np.float32], scale: float) -> AllocationProblem:
    """Returns a problem in which half of the units must take the format that loses."""
    cost = np.tile(np.array([1.0, 3.0]), (len(loss), 1))
    return AllocationProblem(
        loss=loss,
        cost=cost[None],
        limit=np.array([float(2 * len(loss))]),
        allowed=np.ones(loss.shape, dtype=bool),
        resources=("memory_bytes",),
        sketch=sketch,
        interaction_scale=scale,
    )


# Four units, two formats: the narrow one loses about 1, the wide one nothing. Units 0 and 1 lose least, so the
# diagonal narrows both.
LOSS = np.array([[0.90, 0.0], [0.91, 0.0], [1.00, 0.0], [1.01, 0.0]])


def planted(pairs: dict[tuple[int, int], float]) -> NDArray[np.float32]:
    """Returns a sketch with given correlations between the narrow formats of pairs of units."""
    gram = np.zeros((8, 8))
    narrow = np.arange(4) * 2
    gram[narrow, narrow] = 1.0
    for (u, v), correlation in pairs.items():
        gram[2 * u, 2 * v] = gram[2 * v, 2 * u] = correlation
    return sketch_from_gram(gram, LOSS)


def shrinkage_of(*halves: NDArray[np.float32]) -> float:
    return choose_shrinkage(halves, LOSS, partial(build, LOSS), partial(solve, solver="quadratic"))


def test_planted_interaction_that_both_halves_see_is_used() -> None:
    # Narrowing 0 and 1 together costs 0.9 more; any other pair is free of this.
    half = planted({(0, 1): 0.95})
    assert shrinkage_of(half, half) > 0


def test_halves_that_contradict_each_other_give_no_interaction() -> None:
    # Each half praises a pair that the other warns of: whoever follows one is punished by the other.
    first = planted({(0, 2): -0.95, (1, 3): 0.95, (0, 3): 0.0})
    second = planted({(0, 2): 0.95, (1, 3): -0.95})
    assert shrinkage_of(first, second) == 0.0


def test_shrinkages_start_with_none() -> None:
    assert SHRINKAGES[0] == 0.0 and max(SHRINKAGES) == 1.0


def test_without_a_feasible_choice_nothing_is_shrunk() -> None:
    half = planted({})

    def impossible(sketch: NDArray[np.float32], scale: float) -> AllocationProblem:
        problem = build(LOSS, sketch, scale)
        return replace(problem, limit=np.array([1.0]))

    assert choose_shrinkage([half, half], LOSS, impossible, partial(solve, solver="quadratic")) == 0.0


def test_candidates_near_are_one_step_of_cost_away() -> None:
    cost = np.array([[[8.0, 2.0, 4.0, 1.0], [1.0, 2.0, 3.0, 4.0]]])
    allowed = np.array([[True, True, True, True], [True, False, True, True]])
    problem = AllocationProblem(
        loss=np.zeros((2, 4)), cost=cost, limit=np.array([np.inf]), allowed=allowed, resources=("memory_bytes",)
    )
    near = candidates_near(problem, np.array([2, 0]))
    # By cost the first unit's formats are 3, 1, 2, 0; the second's 0, 2, 3, as format 1 is not allowed.
    np.testing.assert_array_equal(near, [[True, True, True, False], [True, False, True, False]])
