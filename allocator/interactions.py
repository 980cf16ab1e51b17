"""Cross terms: from the logit sketch's inner products to a shrunk quadratic objective.

The sketch of an entry is scaled to the loss of the metric in use, v'_uf = v_uf * sqrt(2 loss_uf) / |v_uf|, so the
diagonal stays the metric's own and only the correlations come from the sketch. Cross terms estimated on few
positions mislead an optimizer that is let loose on them, so they are multiplied by a factor in [0, 1], chosen by
cross-validation between the two halves of the positions: solve with the cross terms of one half, score with those
of the other, both ways, and keep the factor whose plans score best. The factor may well be zero.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from solvers import AllocationProblem, SolveResult

SHRINKAGES = (0.0, 0.25, 0.5, 1.0)
# The directions that many entries share; what is left is each entry's own, and mostly noise between entries.
MOST_VECTORS = 256

FloatArray = NDArray[np.float64]


def sketch_from_gram(
    gram: NDArray[np.floating], loss: FloatArray, *, most_vectors: int = MOST_VECTORS
) -> NDArray[np.float32]:
    """Returns vectors [S, U, F] with the leading correlations of a Gram matrix and norms that a loss asks for.

    Args:
        gram: [U * F, U * F] inner products, positive semidefinite.
        loss: [U, F] nats per token; 1/2 |v|^2 of the result, where the directions that are kept hold all of it.
        most_vectors: Leading directions that are kept, S at most.
    """
    norms = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms, dtype=np.float64), where=norms > 0)
    correlation = gram * inverse[:, None] * inverse[None, :]
    values, vectors = np.linalg.eigh(correlation)
    values = np.maximum(values[::-1], 0.0)
    rank = min(most_vectors, int(np.count_nonzero(values > 1e-9 * values[0])))
    scale = np.sqrt(2.0 * np.maximum(loss, 0.0)).ravel()
    sketch = (vectors[:, ::-1][:, :rank] * np.sqrt(values[:rank])).T * scale
    return np.asarray(sketch.reshape(rank, *loss.shape), dtype=np.float32)


def quadratic_loss(choice: NDArray[np.int64], loss: FloatArray, sketch: NDArray[np.float32], scale: float) -> float:
    """Returns the predicted loss of a choice [U] with cross terms times ``scale``, nats per token."""
    units = np.arange(len(choice))
    vectors = sketch[:, units, choice].astype(np.float64)
    cross = 0.5 * (float(np.square(vectors.sum(axis=1)).sum()) - float(np.square(vectors).sum()))
    return float(loss[units, choice].sum()) + scale * cross


def candidates_near(problem: AllocationProblem, choice: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Returns the allowed candidates [U, F] at most one step of cost away from a choice, by the first resource.

    The factor is chosen among plans near the additive optimum: farther ones take many times as long to search, and
    there the second-order model of the sketch is least to be trusted.

    Args:
        problem: The problem.
        choice: [U] format indices.
    """
    cost = np.where(problem.allowed, problem.cost[0], np.inf)
    rank = cost.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    own = rank[np.arange(len(choice)), choice]
    return np.asarray(problem.allowed & (np.abs(rank - own[:, None]) <= 1))


def choose_shrinkage(
    halves: Sequence[NDArray[np.float32]],
    loss: FloatArray,
    build: Callable[[NDArray[np.float32], float], AllocationProblem],
    solve: Callable[[AllocationProblem], SolveResult],
) -> float:
    """Returns the factor of ``SHRINKAGES`` whose plans score best on the half that they were not made from.

    Args:
        halves: Sketches [S, U, F] of the two halves.
        loss: [U, F] of the metric in use.
        build: (sketch, factor) -> problem.
        solve: A quadratic solver.
    """
    scores = []
    for shrinkage in SHRINKAGES:
        score = 0.0
        for own, other in (halves, halves[::-1]):
            choice = solve(build(own, shrinkage)).choice
            score += np.inf if choice is None else quadratic_loss(choice, loss, other, 1.0)
        scores.append(score)
    return SHRINKAGES[int(np.argmin(scores))]
