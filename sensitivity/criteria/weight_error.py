"""Weight error: the squared Frobenius norm of a candidate's error, ||render(W, f) - W||^2. Data-free.

The unit of measure is squared weight, not nats: comparable between units only as far as their weights are. Divided by
||W||^2 it is the noise-to-signal power ratio, which no rescaling of a weight changes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.candidates import Candidates
from runtime.rendering import RenderingRule, render_weight
from runtime.residency import InMemory, Residency
from runtime.units import Unit, Weight, read_weight


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightDifference:
    """What one format does to one weight.

    Args:
        unit_index: Row of the tables.
        format_index: Column of the tables.
        weight: The weight.
        difference: [out_features, in_features] float32, the rendered weight minus its own values.
    """

    unit_index: int
    format_index: int
    weight: Weight
    difference: Tensor


def list_differences(
    model: nn.Module,
    candidates: Candidates,
    *,
    quantizer: RenderingRule = "rtn",
    residency: Residency | None = None,
) -> Iterator[WeightDifference]:
    """Yields the difference of every weight at every allowed format of its unit, one at a time.

    Args:
        model: The reference model.
        candidates: Units and formats.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        residency: Brings the weights into memory.
    """
    residency = residency or InMemory()
    weights = [(u, weight) for u, unit in enumerate(candidates.units) for weight in unit.weights]
    for block, group in groupby(weights, key=lambda pair: residency.block_of(pair[1].parameter)):
        with residency.resident(block):
            for u, weight in group:
                values = read_weight(model, weight)
                for f in np.flatnonzero(candidates.allowed[u]).tolist():
                    rendered = render_weight(weight, values, candidates.formats[f], quantizer)
                    yield WeightDifference(unit_index=u, format_index=f, weight=weight, difference=rendered - values)


def measure_weight_error(
    model: nn.Module,
    candidates: Candidates,
    *,
    quantizer: RenderingRule = "rtn",
    residency: Residency | None = None,
) -> NDArray[np.float64]:
    """Returns the weight error [U, F] of every allowed candidate (zero elsewhere).

    Args:
        model: The reference model.
        candidates: Units and formats.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        residency: Brings the weights into memory.
    """
    error = np.zeros(candidates.allowed.shape)
    for d in list_differences(model, candidates, quantizer=quantizer, residency=residency):
        error[d.unit_index, d.format_index] += float(d.difference.square().sum())
    return error


def measure_weight_power(model: nn.Module, units: Sequence[Unit]) -> NDArray[np.float64]:
    """Returns the squared Frobenius norm [U] of every unit's weights."""
    return np.array([sum(float(read_weight(model, w).square().sum()) for w in unit.weights) for unit in units])


def relative_error(weight_error: NDArray[np.float64], weight_power: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the noise-to-signal power ratio [U, F]; zero where there is no error.

    Args:
        weight_error: [U, F].
        weight_power: [U].
    """
    # Weights that are all zero are rendered without error.
    power = np.where(weight_power > 0.0, weight_power, 1.0)
    ratio: NDArray[np.float64] = weight_error / power[:, None]
    return ratio


def signal_to_noise_db(ratio: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns noise-to-signal power ratios as signal-to-noise in dB: larger is better, infinite without noise."""
    with np.errstate(divide="ignore"):
        decibel: NDArray[np.float64] = -10.0 * np.log10(ratio)
    return decibel
