"""Weight error: the squared Frobenius norm of a candidate's error, ||render(W, f) - W||^2. Data-free.

The unit of measure is squared weight, not nats: comparable between units only as far as their weights are.
"""

import numpy as np
from numpy.typing import NDArray
from torch import nn

from runtime.candidates import Candidates
from runtime.quantizers import render
from runtime.units import read_weight


def measure_weight_error(model: nn.Module, candidates: Candidates, *, quantizer: str = "rtn") -> NDArray[np.float64]:
    """Returns the weight error [U, F] of every allowed candidate (zero elsewhere)."""
    error = np.zeros(candidates.allowed.shape)
    for u, f in zip(*np.nonzero(candidates.allowed), strict=True):
        for weight in candidates.units[u].weights:
            values = read_weight(model, weight)
            error[u, f] += float((render(values, candidates.formats[f], quantizer) - values).square().sum())
    return error
