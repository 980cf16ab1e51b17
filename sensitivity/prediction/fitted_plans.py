"""Whole plans measured on calibration text, to which the corrections of a profile's predictions are fitted."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from runtime.candidates import Candidates
from runtime.costs import memory_cost
from runtime.rendering import RenderingRule
from sensitivity.evaluation import score_assignments
from sensitivity.pieces import Piece, read_or_measure
from sensitivity.prediction.prediction_fit import FloatArray, PredictionFit, draw_choices, fit_predictions
from sensitivity.profile import NATS, LossTable
from sensitivity.sketches.combination import COMBINED

_PLANS_AT_ONCE = 4  # the reference is run once for so many


def fit_profile(
    model: Any,
    candidates: Candidates,
    losses: Mapping[str, LossTable],
    tokens: Tensor,
    *,
    count: int,
    quantizer: RenderingRule,
    seed: int,
    pieces: Path,
    progress: Callable[[int, int], None],
) -> dict[str, PredictionFit]:
    """Returns the correction of every metric in nats per token that the measured plans allow to fit.

    Args:
        model: The reference model.
        candidates: Units and formats.
        losses: Metric -> table.
        tokens: [S, T] int64 calibration text.
        count: Plans to measure.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        seed: Seed of the draws.
        pieces: Directory of the finished plans.
        progress: Called with (plans measured, plans in all).
    """
    predicting = [metric for metric, table in losses.items() if table.unit_of_measure == NATS]
    if not predicting:
        return {}
    guide = losses[COMBINED if COMBINED in predicting else predicting[0]].loss
    weights = np.array([unit.weight_count for unit in candidates.units], dtype=np.float64)
    stored = memory_cost(candidates, 0).cost
    choices = draw_choices(guide, stored, candidates.allowed, weights, count=count, seed=seed)

    def measure(first: int) -> Piece:
        formats = {
            f"{p:03d}": {
                weight.name: candidates.formats[int(f)].name
                for unit, f in zip(candidates.units, choices[p], strict=True)
                for weight in unit.weights
            }
            for p in range(first, min(first + _PLANS_AT_ONCE, count))
        }
        scores = score_assignments(model, formats, tokens, quantizer=quantizer)
        return {"kl": np.array([scores[name].kl.mean() for name in formats])}

    progress(0, count)
    measured: list[float] = []
    for first in range(0, count, _PLANS_AT_ONCE):
        measured += read_or_measure(pieces / f"{first:03d}.safetensors", partial(measure, first))["kl"].tolist()
        progress(len(measured), count)
    units = np.arange(len(candidates.units))
    fits = {
        metric: _try_fit(losses[metric].loss[units, choices].sum(axis=1), np.array(measured)) for metric in predicting
    }
    return {metric: fit for metric, fit in fits.items() if fit is not None}


def _try_fit(predicted: FloatArray, measured: FloatArray) -> PredictionFit | None:
    # Without a lossy format, or on a model that the losses say nothing of, there is nothing to correct.
    usable = (predicted > 0) & (measured > 0)
    try:
        return fit_predictions(predicted[usable], measured[usable])
    except ValueError:
        return None
