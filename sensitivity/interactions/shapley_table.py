"""Tables and matrices for the solvers out of Shapley values.

Two formats: ``pair_table`` is the loss over the start, exact in the sense of the values. All formats:
``extend_table`` scales each row of another table so that its step from the start to the target format is the value,

    loss[u, f] = base[u, f] * phi[u] / (base[u, target] - base[u, start]),

the shape of a row from the base (any metric: its unit of measure cancels), its size from the value. Rows without a
factor (no player, or a step or a value that is not positive) take the median factor of the others.

``build_shapley_matrix`` is CoopQ's quadratic form of the pair, with q_u = 1 where u is lowered:

    sum_u a_u q_u + q'Kq,     a_u = phi_u - sum_{v != u} K_uv,     K = (1 - s) C + s diag(C).

C, the covariance of marginals over permutations, has squared nats for a unit of measure and, in a game of pairwise
interactions I alone, the off-diagonal part of two units is -I^2 / 4, not I: a heuristic, to be verified like any.
"""

import numpy as np
from numpy.typing import NDArray

from runtime.candidates import Candidates
from sensitivity.interactions.shapley import ShapleyMarginals
from sensitivity.profile import NATS, LossTable


def pair_table(marginals: ShapleyMarginals, candidates: Candidates) -> tuple[LossTable, NDArray[np.bool_]]:
    """Returns the loss [U, F] over the start, and the candidates [U, F] that it speaks of.

    A player has its start format at loss 0 and its target format at its value; any other unit is held at one format,
    at loss 0. The KL of a choice is predicted as the mean of ``start_kl`` plus the sum of its losses.
    """
    start, target = _formats(marginals, candidates)
    loss, std_error = np.zeros(candidates.allowed.shape), np.zeros(candidates.allowed.shape)
    loss[marginals.players, target] = marginals.value
    std_error[marginals.players, target] = marginals.std_error
    allowed = np.zeros_like(candidates.allowed)
    bits = np.array([format_.bits for format_ in candidates.formats])
    held = np.where(candidates.allowed[:, start], start, np.where(candidates.allowed, bits, -1).argmax(axis=1))
    allowed[np.arange(len(held)), held] = True
    allowed[marginals.players, target] = True
    return LossTable(loss=loss, std_error=std_error, unit_of_measure=NATS), allowed


def find_factors(base: LossTable, marginals: ShapleyMarginals, candidates: Candidates) -> NDArray[np.float64]:
    """Returns the factor [U] from the base's losses to the values; NaN for a unit that has none of its own."""
    start, target = _formats(marginals, candidates)
    step = (base.loss[:, target] - base.loss[:, start])[marginals.players]
    valid = (step > 0.0) & (marginals.value > 0.0)
    factors = np.full(len(base.loss), np.nan)
    factors[marginals.players[valid]] = marginals.value[valid] / step[valid]
    return factors


def extend_table(base: LossTable, marginals: ShapleyMarginals, candidates: Candidates) -> LossTable:
    """Returns a table of all formats: the base's rows, scaled to the values.

    The standard error is the value's, carried along the row; that of the base's shape is left out. Rows of the
    median factor keep the base's own.

    Raises:
        ValueError: If no unit has a factor of its own.
    """
    factors = find_factors(base, marginals, candidates)
    own = np.isfinite(factors)
    if not own.any():
        msg = (
            "a unit must lose more at the target than at the start, by its Shapley value and by the base: got none "
            f"among {len(marginals.players)} players. Measure more permutations, or formats further apart."
        )
        raise ValueError(msg)
    relative = np.zeros(len(factors))
    relative[marginals.players] = np.abs(marginals.std_error / np.where(marginals.value == 0.0, 1.0, marginals.value))
    scale = np.where(own, factors, np.median(factors[own]))[:, None]
    loss = np.where(candidates.allowed, base.loss * scale, 0.0)
    std_error = np.where(own[:, None], np.abs(loss) * relative[:, None], base.std_error * scale)
    return LossTable(loss=loss, std_error=np.where(candidates.allowed, std_error, 0.0), unit_of_measure=NATS)


def build_shapley_matrix(
    marginals: ShapleyMarginals, candidates: Candidates, *, shrinkage: float = 0.5
) -> NDArray[np.float64]:
    """Returns CoopQ's quadratic form as the solvers' dense matrix G, [U * F, U * F], with 1/2 x'Gx its value.

    Args:
        marginals: Players and marginals.
        candidates: Units and formats.
        shrinkage: s, 0 to 1.

    Raises:
        ValueError: If s is not between 0 and 1.
    """
    K = marginals.shrunk_covariance(shrinkage)
    linear = marginals.value - (K.sum(axis=1) - np.diag(K))
    # q is 0 or 1, so the diagonal of K is part of the linear term.
    small = 2.0 * K
    np.fill_diagonal(small, 2.0 * (linear + np.diag(K)))
    matrix = np.zeros((candidates.allowed.size, candidates.allowed.size))
    rows = marginals.players * len(candidates.formats) + _formats(marginals, candidates)[1]
    matrix[np.ix_(rows, rows)] = small
    return matrix


def _formats(marginals: ShapleyMarginals, candidates: Candidates) -> tuple[int, int]:
    config = marginals.config
    return candidates.format_index(config.start_format), candidates.format_index(config.target_format)
