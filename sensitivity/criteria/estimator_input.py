"""What every estimator is given, and what several of them share.

Weight errors, statistics of the inputs and column curvatures are computed when the first estimator asks for them, once
for each ``EstimatorInput``.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from runtime.candidates import Candidates
from runtime.quantizers import QUANTIZERS
from runtime.rendering import RenderingRule, quantizer_name
from sensitivity.criteria.column_loss import ColumnCurvatures
from sensitivity.criteria.statistics import ModelStatistics, measure_statistics
from sensitivity.criteria.weight_error import measure_weight_error, measure_weight_power, relative_error

_Float = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class EstimatorInput:
    """What an estimator is given.

    Args:
        model: The reference model in float32.
        candidates: Units and formats.
        tokens: [S, T] int64 of calibration text, or None for estimators that need weights only.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        seed: Seed of whatever is drawn.

    Raises:
        ValueError: If the quantizer is unknown or the tokens are not [S, T] with S, T at least 1.
    """

    model: Any
    candidates: Candidates
    tokens: Tensor | None = None
    quantizer: RenderingRule = "rtn"
    seed: int = 0

    def __post_init__(self) -> None:
        if quantizer_name(self.quantizer) not in QUANTIZERS:
            msg = f"quantizer must be among {', '.join(QUANTIZERS)}: got '{self.quantizer}'. Correct the name."
            raise ValueError(msg)
        if self.tokens is not None and (self.tokens.ndim != 2 or not self.tokens.numel()):
            msg = f"tokens must be [S, T], not empty: got shape {tuple(self.tokens.shape)}. Stack equal sequences."
            raise ValueError(msg)

    @cached_property
    def weight_error(self) -> _Float:
        """Squared weight error [U, F]."""
        return measure_weight_error(self.model, self.candidates, quantizer=self.quantizer)

    @cached_property
    def noise_to_signal(self) -> _Float:
        """Noise-to-signal power ratio [U, F]."""
        return relative_error(self.weight_error, measure_weight_power(self.model, self.candidates.units))

    @cached_property
    def statistics(self) -> ModelStatistics:
        """Statistics of the inputs, from one pass over all tokens."""
        return measure_statistics(self.model, self.text)

    @cached_property
    def curvatures(self) -> ColumnCurvatures:
        """Column curvatures of the inputs."""
        return ColumnCurvatures(self.statistics)

    @property
    def text(self) -> Tensor:
        """The tokens [S, T].

        Raises:
            ValueError: If none were given.
        """
        if self.tokens is None:
            msg = "tokens must be given for an estimator that runs the model: got None. Name a calibration text."
            raise ValueError(msg)
        return self.tokens
