"""The sensitivity profile: everything measured about a model, as one frozen value that can be queried."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.cache_formats import CacheLoad
from runtime.candidates import Candidates
from sensitivity.experts.routing import RoutingStatistics
from sensitivity.prediction.prediction_fit import PredictionFit
from sensitivity.profile_html import profile_html

NATS = "nats/token"


@dataclass(frozen=True, kw_only=True)
class LossTable:
    """One metric's table.

    Args:
        loss: [U, F] float64; zero where the pair is not allowed.
        std_error: [U, F] float64 of the same unit, zero where the metric is not a sample.
        unit_of_measure: ``nats/token`` for predictions of KL, otherwise the metric's own.
        measured: [U, F] bool, False where the loss of an allowed pair was not measured but completed from others;
            None where every one was measured.
    """

    loss: NDArray[np.float64]
    std_error: NDArray[np.float64]
    unit_of_measure: str
    measured: NDArray[np.bool_] | None = None


@dataclass(frozen=True, kw_only=True)
class CacheLosses:
    """What was measured of the caches of a model.

    Args:
        candidates: Cache units, formats, allowed pairs.
        table: Measured KL of each pair, in nats per token.
    """

    candidates: Candidates
    table: LossTable


@dataclass(frozen=True, kw_only=True)
class ActivationLosses:
    """What was measured of the activations of a model.

    Args:
        candidates: Activation units, formats, allowed pairs.
        table: Loss of each pair, in nats per token.
        scales: Linear layer -> static format -> its scale, [1] or [in_features] float32.
    """

    candidates: Candidates
    table: LossTable
    scales: Mapping[str, Mapping[str, NDArray[np.float32]]]


@dataclass(frozen=True, kw_only=True)
class SensitivityProfile:
    """Losses of every candidate by every metric, with what is needed to price and to verify a plan.

    Args:
        candidates: Units, formats, allowed pairs.
        losses: Metric -> table.
        fisher_sketch: [S, U, F] float32, or None when not measured.
        logit_gram: [2, U * F, U * F] float32 inner products of the logit sketches on two halves of the positions,
            or None where not every pair was measured.
        prediction_fits: Metric -> correction of its predictions, where plans were measured to fit it to.
        calibration_tokens: [S, T] int64 that the sketch was taken on.
        selection_tokens: [S, T] int64 that choose between plans; neither calibration nor evaluation.
        evaluation_tokens: [S, T] int64 that nothing but the final evaluation sees.
        fixed_bytes: Bytes of the packed file that no choice changes.
        rest_bytes: Bytes of the unquantized rest among these.
        reference_bytes: Bytes of the reference model.
        expert_share: Experts a token visits / experts of a layer; 1 without experts.
        routing: How often each expert is taken on the calibration text, or None without experts.
        provenance: Names and fingerprints of what the profile was measured from.
        cache: What was measured of the caches, or None where no formats of theirs were asked for.
        cache_load: How full the caches among the candidates are (``sensitivity.cache_losses.join_cache``); None in a
            profile as it is measured, whose candidates are weights alone.
        activations: What was measured of the activations, or None where no formats of theirs were asked for.
        activations_joined: Whether they are among the candidates (``sensitivity.activation_losses.join_activations``).
        exporter: Who writes the file that bytes are counted of (``runtime.file_bytes``), ``fixed_bytes`` included; None
            for the packed file, as in a profile that is measured.
    """

    candidates: Candidates
    losses: Mapping[str, LossTable]
    fisher_sketch: NDArray[np.float32] | None
    logit_gram: NDArray[np.float32] | None
    prediction_fits: Mapping[str, PredictionFit]
    calibration_tokens: NDArray[np.int64]
    selection_tokens: NDArray[np.int64]
    evaluation_tokens: NDArray[np.int64]
    fixed_bytes: int
    rest_bytes: int
    reference_bytes: int
    expert_share: float
    routing: RoutingStatistics | None
    provenance: Mapping[str, str]
    cache: CacheLosses | None = None
    cache_load: CacheLoad | None = None
    activations: ActivationLosses | None = None
    activations_joined: bool = False
    exporter: str | None = None

    def table(self, metric: str) -> LossTable:
        """Returns the table of a metric.

        Raises:
            ValueError: If the profile does not hold it.
        """
        if metric not in self.losses:
            msg = (
                f"metric must be one the profile holds: got '{metric}', held are {', '.join(self.losses)}. "
                "Measure again with this metric."
            )
            raise ValueError(msg)
        return self.losses[metric]

    def _repr_html_(self) -> str:
        """Returns the profile as a notebook shows it, by the last metric that predicts KL."""
        predicting = [name for name, table in self.losses.items() if table.unit_of_measure == NATS]
        metric = predicting[-1] if predicting else next(iter(self.losses))
        lines = [
            f"{len(self.candidates.units)} units, {len(self.candidates.formats)} formats, {', '.join(self.losses)}",
            f"Mean loss of a unit by '{metric}', {self.losses[metric].unit_of_measure}:",
        ]
        title = f"Sensitivity profile of {self.provenance['model']}"
        return profile_html(title, lines, self.candidates, self.losses[metric].loss)

    @property
    def fingerprint(self) -> str:
        """Hash of what the profile was measured from (the key it is stored under)."""
        return self.provenance["profile"]


def fingerprint_of(parts: Mapping[str, Any]) -> str:
    """Returns a hash of named JSON values, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
