"""What an estimator is: its function, and what is told of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sensitivity.criteria.estimator_input import EstimatorInput
from sensitivity.profile import LossTable

Inputs = Literal["weights", "forward", "gradients", "measured"]
_Float = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """One row of ``ESTIMATORS``.

    Args:
        name: Its key there.
        inputs: What it needs: weights only, one forward pass, gradients, or a measurement of every unit.
        unit_of_measure: Of its losses; ``nats/token`` where they predict KL.
        description: One line.
        paper: Where it is from.
        function: Loss [U, F] and standard error [U, F] of an input; zero where a pair is not allowed.
        score: Raw score [U], larger is more sensitive, of a criterion that ranks units; NaN where a unit has none.
            None for criteria of (unit, format) pairs.
    """

    name: str
    inputs: Inputs
    unit_of_measure: str
    description: str
    paper: str
    function: Callable[[EstimatorInput], tuple[_Float, _Float]]
    score: Callable[[EstimatorInput], _Float] | None = None

    def estimate(self, given: EstimatorInput) -> LossTable:
        """Returns the table of an input."""
        loss, std_error = self.function(given)
        return LossTable(loss=loss, std_error=std_error, unit_of_measure=self.unit_of_measure)
