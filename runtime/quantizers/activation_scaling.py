"""Activation-aware scaling: input channels that carry large activations are scaled up before rounding.

With m_j the root mean square of channel j and s = m^alpha (normalised so that sqrt(max s * min s) = 1),

    W x = (W diag(s)) (diag(1/s) x),       rendered = Q(W diag(s)) diag(1/s),

a weight of a large channel is rounded in finer steps of its own size, at the cost of the others in its group. alpha is
the one of a list with the least tr(D H D'); alpha = 0 is no scaling. Complexity: one quantization and rows * in^2 for
each alpha.

What can be stored: Q(W diag(s)) is a quantized weight like any other, but the inputs must be divided by s by whatever
made them (a norm, the value or the up projection: see ``runtime.transforms``), so all weights that read one input take
one s: concatenate their rows. Without that folding the rendered weight is no stored format, and this is therefore no
entry of the table of quantizers. Any quantizer can follow on ``scale_inputs``.

Paper: Lin et al. 2023 (AWQ, arXiv:2306.00978, equations 4 and 5). There m is the mean magnitude, of which second
moments know only the bound used here, and the error is measured on samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.formats import Format
from runtime.quantization import QuantizedWeight, dequantize
from runtime.quantizers.input_statistics import InputStatistics
from runtime.quantizers.rtn import quantize_rtn

EXPONENTS = tuple(step / 20 for step in range(20))


@dataclass(frozen=True, kw_only=True, eq=False)
class ActivationScale:
    """A scale of the input channels, and what it does to the weight it was found for.

    Args:
        scale: [in_features] float32, positive: the weight's columns are multiplied, its inputs divided by it.
        exponent: alpha.
        output_error: tr(D M D') per input of the rendered weight.
        rendered: [out_features, in_features] float32, rounded with the scale and divided by it again.
    """

    scale: Tensor
    exponent: float
    output_error: float
    rendered: Tensor


def find_activation_scale(
    weight: Tensor,
    format_: Format,
    statistics: InputStatistics,
    *,
    exponents: Sequence[float] = EXPONENTS,
    quantizer: Callable[[Tensor, Format], QuantizedWeight] = quantize_rtn,
) -> ActivationScale:
    """Returns the scale of the best exponent.

    Args:
        weight: [out_features, in_features]; the rows of all weights that read the input.
        format_: An integer format whose group size divides in_features.
        statistics: Of the input.
        exponents: Those tried, at least one.
        quantizer: Rounds the scaled weight.

    Raises:
        ValueError: If there is no exponent, the statistics are of another input, or the quantizer refuses the weight.
    """
    statistics.check_fits(weight)
    wide = weight.to(torch.float32)
    found: ActivationScale | None = None
    for exponent in exponents:
        scale = _scale_of(statistics.root_mean_square(), exponent)
        rendered = dequantize(quantizer(wide * scale, format_)).div_(scale)
        error = statistics.output_error(rendered - wide)
        if found is None or error < found.output_error:
            found = ActivationScale(scale=scale, exponent=exponent, output_error=error, rendered=rendered)
    if found is None:
        msg = "exponents must name at least one: got none. Use EXPONENTS."
        raise ValueError(msg)
    return found


def scale_inputs(weight: Tensor, statistics: InputStatistics, scale: Tensor) -> tuple[Tensor, InputStatistics]:
    """Returns the weight [out_features, in_features] and its statistics once the inputs are divided by ``scale``."""
    return weight.to(torch.float32) * scale, statistics.divided(scale)


def _scale_of(magnitude: Tensor, exponent: float) -> Tensor:
    # Dead channels are scaled as the least of the others.
    alive = magnitude[magnitude > 0]
    if len(alive) == 0:
        return torch.ones_like(magnitude)
    scale = magnitude.clamp(min=float(alive.min())).pow(exponent)
    return scale / (scale.max() * scale.min()).sqrt()
