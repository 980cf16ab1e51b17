"""CLADO's dense matrix of pairwise losses, brought into the form of the quadratic solver.

Over one-hot vectors x (index u F + f), the objective is 1/2 x' G x with

    G[i, i] = 2 P[i],    G[i, j] = P[i, j] - P[i] - P[j]    (i, j candidates of different units),

P[i] the loss with candidate i alone, P[i, j] with both. Measured G has negative eigenvalues; setting them to 0 gives
the nearest positive semidefinite matrix (in the Frobenius norm), G+ = V' V, and the columns of V are a sketch:

    loss[u, f] = G+[uf, uf] / 2,    <sketch[:, u, f], sketch[:, v, g]> = G+[uf, vg].

The projection changes losses as well as interactions; by how much is reported.

Complexity: O((U F)^3) once. Limits: U^2 F^2 / 2 measurements; a few thousand candidates.
Source: Deng et al., CLADO, arXiv 2307.05657.
"""

from dataclasses import dataclass

import numpy as np

from solvers.problem import BoolArray, FloatArray

RANK_TOLERANCE = 1e-12
SYMMETRY_TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True, eq=False)
class PairwiseSketch:
    """What `AllocationProblem` takes (with interaction_scale 1), and what the projection did.

    Args:
        loss: nats per token, [U, F].
        sketch: [S, U, F], S the rank of the projected matrix.
        relative_distortion: ||G - G+|| / ||G|| in the Frobenius norm; 0 for a positive semidefinite matrix.
        least_eigenvalue: of G; how negative says how much was removed at one stroke.
        most_loss_change: largest |change| of a single loss by the projection, nats per token.
    """

    loss: FloatArray
    sketch: FloatArray
    relative_distortion: float
    least_eigenvalue: float
    most_loss_change: float


def build_pairwise_matrix(single: FloatArray, pair: FloatArray) -> FloatArray:
    """Returns G, [UF, UF], from measured losses; entries within a unit are 0 off the diagonal.

    Args:
        single: loss with one candidate alone, [U, F].
        pair: loss with two candidates of different units, symmetric, [UF, UF]; entries within a unit are ignored.

    Raises:
        ValueError: shapes that do not fit.
    """
    n_units, n_formats = single.shape
    size = n_units * n_formats
    if pair.shape != (size, size):
        msg = f"pair must have shape {(size, size)} for single of shape {single.shape}: got {pair.shape}."
        raise ValueError(msg)
    alone = single.ravel()
    unit = np.repeat(np.arange(n_units), n_formats)
    matrix = np.where(unit[:, None] == unit, 0.0, pair - alone[:, None] - alone)
    np.fill_diagonal(matrix, 2.0 * alone)
    return np.asarray(matrix)


def project_pairwise(
    matrix: FloatArray,
    *,
    n_formats: int,
    allowed: BoolArray | None = None,
    keep_losses: bool = False,
) -> PairwiseSketch:
    """Returns loss and sketch of a dense pairwise matrix after projection onto the positive semidefinite ones.

    Args:
        matrix: G, symmetric, [UF, UF], candidate (u, f) at u F + f.
        n_formats: F.
        allowed: candidates that count, [U, F]; rows and columns of the others are ignored. All when None.
        keep_losses: take the losses from G, as measured, and only the interactions from G+. CLADO takes both
            from G+.

    Raises:
        ValueError: a matrix that is not square, not symmetric, not finite, or no multiple of n_formats.
    """
    counts = np.ones(matrix.shape[0], dtype=bool) if allowed is None else allowed.ravel()
    used = _check_matrix(matrix, n_formats, counts)
    values, vectors = np.linalg.eigh(used)
    kept = values > RANK_TOLERANCE * max(float(np.abs(values).max()), 1e-300)
    factor = np.sqrt(values[kept])[:, None] * vectors[:, kept].T
    # The eigenvectors leave rounding in the rows that were set to 0.
    factor[:, ~counts] = 0.0
    losses = 0.5 * np.sum(factor * factor, axis=0)
    measured = 0.5 * np.diag(used)
    removed = float(np.linalg.norm(np.minimum(values, 0.0)))
    return PairwiseSketch(
        loss=(measured if keep_losses else losses).reshape(-1, n_formats),
        sketch=factor.reshape(-1, matrix.shape[0] // n_formats, n_formats),
        relative_distortion=removed / max(float(np.linalg.norm(values)), 1e-300),
        least_eigenvalue=float(values[0]),
        most_loss_change=float(np.abs(losses - measured).max()),
    )


def _check_matrix(matrix: FloatArray, n_formats: int, counts: BoolArray) -> FloatArray:
    """Returns the matrix, exactly symmetric, with 0 in the rows and columns that do not count."""
    size = matrix.shape[0]
    if matrix.shape != (size, size) or n_formats < 1 or size % n_formats:
        msg = f"matrix must be [UF, UF] with n_formats={n_formats}: got shape {matrix.shape}."
        raise ValueError(msg)
    used = np.where(counts[:, None] & counts, matrix, 0.0)
    asymmetry = float(np.abs(used - used.T).max())
    if not asymmetry <= SYMMETRY_TOLERANCE * float(np.abs(used).max()):
        msg = f"matrix must be finite and symmetric: got entries that differ by {asymmetry}. Average it with G.T."
        raise ValueError(msg)
    return np.asarray(0.5 * (used + used.T))
