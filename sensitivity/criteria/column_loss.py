"""Criteria on the diagonal of the inverse Hessian's Cholesky factor: BAQ's column loss and ShiftAddLLM's score.

With H = 2/n sum x x' + 0.01 mean(diag H) I over the n calibration tokens and U the upper Cholesky factor of H^-1
(H^-1 = U'U), 1 / U_jj^2 is what is left of H_jj when the columns after j can be corrected for it. GPTQ pays this for
an error in column j:

    BAQ:          loss_uf  = 1/2 sum_ij D_ij^2 / U_jj^2,                      D the rendered error
    ShiftAddLLM:  score_u  = || |W| / diag U ||_F x std(W / diag U)^2         (a ranking of units)

H = R R' with R = U^-1 upper triangular, so 1 / U_jj = R_jj comes from one Cholesky factor of H with both axes
reversed, and nothing is inverted. An embedding sees one-hot inputs: its H is diagonal and its columns are its rows.
n counts all tokens, also for experts that few of them visit, so losses are per token of the model. float64;
in_features^3 / 3 for each distinct input.

Papers: Zhang et al. 2025 (BAQ, arXiv:2506.05664), whose losses are those of GPTQ at one reference width; You et al.
2024 (ShiftAddLLM, arXiv:2406.05981).
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.candidates import Candidates
from runtime.rendering import RenderingRule
from runtime.units import Unit, Weight, read_weight
from sensitivity.criteria.statistics import ModelStatistics
from sensitivity.criteria.weight_error import list_differences

DAMPING = 0.01  # of the mean of H's diagonal, as in GPTQ


class ColumnCurvatures:
    """1 / U_jj^2 of every weight's inputs.

    Args:
        statistics: Of the model.
    """

    def __init__(self, statistics: ModelStatistics) -> None:
        moments, tokens = statistics.moments, statistics.token_count
        # Weights that read one input share one sum.
        shared = {id(moment): moment for moment in moments.linear.values()}
        of_moment = {key: column_curvature(moment, tokens) for key, moment in shared.items()}
        self._linear = {name: of_moment[id(moment)] for name, moment in moments.linear.items()}
        self._embedding = {
            name: _damped(counts.double() * (2.0 / tokens)) for name, counts in moments.embedding.items()
        }

    def readers(self, weight: Weight) -> Iterator[tuple[Tensor, int]]:
        """Yields (curvature, axis of the weight that it belongs to) for everything that reads a weight."""
        if weight.name in self._linear:
            yield self._linear[weight.name], 1
        if weight.name in self._embedding:
            yield self._embedding[weight.name], 0


def column_curvature(moment: Tensor, token_count: int) -> Tensor:
    """Returns 1 / U_jj^2 [in_features] float64.

    Args:
        moment: [in_features, in_features] sum of x x'.
        token_count: Tokens of the calibration text.
    """
    H = moment.double() * (2.0 / token_count)
    H.diagonal().copy_(_damped(H.diagonal()))
    if not bool(H.diagonal().any()):
        return torch.zeros(len(H), dtype=torch.float64)
    factor: Tensor = torch.linalg.cholesky(H.flip(0, 1))
    return factor.diagonal().flip(0).square()


def measure_column_loss(
    model: nn.Module, candidates: Candidates, curvatures: ColumnCurvatures, *, quantizer: RenderingRule = "rtn"
) -> NDArray[np.float64]:
    """Returns BAQ's loss [U, F], per token, of every allowed candidate (zero elsewhere)."""
    loss = np.zeros(candidates.allowed.shape)
    for d in list_differences(model, candidates, quantizer=quantizer):
        for curvature, axis in curvatures.readers(d.weight):
            columns = d.difference.square().sum(dim=1 - axis).double()
            loss[d.unit_index, d.format_index] += 0.5 * float(columns @ curvature)
    return loss


def score_inverse_hessian(model: nn.Module, units: Sequence[Unit], curvatures: ColumnCurvatures) -> NDArray[np.float64]:
    """Returns ShiftAddLLM's score [U], summed over a unit's weights; NaN where no token came."""
    return np.array([_score_unit(model, unit, curvatures) for unit in units])


def _score_unit(model: nn.Module, unit: Unit, curvatures: ColumnCurvatures) -> float:
    scores = []
    for weight in unit.weights:
        values = read_weight(model, weight)
        for curvature, axis in curvatures.readers(weight):
            scaled = values * curvature.sqrt().to(values.dtype).unsqueeze(1 - axis)
            scores.append(float(scaled.norm() * scaled.var(correction=0)))
    return sum(scores) if scores else np.nan


def _damped(diagonal: Tensor) -> Tensor:
    return diagonal + DAMPING * diagonal.mean()
