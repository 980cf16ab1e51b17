"""Equalization without data: each channel's scale divides between its inputs and its column what rounding costs there.

Where a block of a row is rounded in steps of its own size, the squared error of the output is about

    sum_rows sum_blocks (sum_c w_c^2 s_c^2) (sum_c m_c^2 / s_c^2),

m_c the root mean square of channel c, w_c that of its column over all readers, s_c the scale that the column is
multiplied and the channel divided by. For rows of one profile the least is where both sums have the same terms, by
Cauchy and Schwarz: s_c = sqrt(m_c / w_c). Rows are not alike, and m is an estimate, so exponents are free:

    s_c = m_c^inputs / w_c^weights,

the geometric mean set to 1. Where they add up to 1, channels that were rescaled before end at the same place. A quarter
each, half of the way there, left least where codes are weighted by the inputs too; where they are rounded to nearest,
a half and a quarter left as little or less (SmolLM2-135M, llama.cpp's formats of 4 and 5 bits).

m is that on tokens drawn evenly from the vocabulary (``runtime.drawn_tokens``), so no text is read, no statistics come
with the model, and the result is a function of the weights. Complexity: one run of 4,096 tokens. Searching both
exponents for each site by the rounding error that they predict took as long again and gained nothing.

Papers: Nagel et al. 2019 (data-free quantization, arXiv:1906.04721, section 4.1) equalize the ranges of neighbouring
weights; Xiao et al. 2022 (SmoothQuant, arXiv:2211.10438, equation 4) weigh largest inputs against largest weights; Lin
et al. 2023 (AWQ, arXiv:2306.00978) weigh by the inputs on calibration text.
"""

import torch
from torch import Tensor, nn

from runtime.drawn_tokens import SEQUENCES, draw_tokens
from runtime.transforms.observation import observe_powers
from runtime.transforms.scale_folding import ScaleSite, list_scale_sites


def find_equalization(
    model: nn.Module,
    tokens: Tensor | None,
    *,
    inputs: float = 0.25,
    weights: float = 0.25,
    sequences: int = SEQUENCES,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Returns site name -> the factors 1/s [C] float64 of what writes the channels.

    Args:
        model: The decoder.
        tokens: Not read.
        inputs: Exponent of the inputs' size, 0 to 1.
        weights: Exponent of the columns' size, 0 to 1.
        sequences: Sequences of drawn tokens, at least one.
        seed: Of the tokens.

    Raises:
        ValueError: If an option is out of range, or the model is no decoder of the known kind.
    """
    for name, exponent in (("inputs", inputs), ("weights", weights)):
        if not 0 <= exponent <= 1:
            msg = f"exponents must be between 0 and 1: got {name}={exponent}. Use 0.25."
            raise ValueError(msg)
    sites = list_scale_sites(model)
    drawn = draw_tokens(model, sequences=sequences, seed=seed)
    powers = observe_powers(model, drawn, {site.name: site.observed for site in sites})
    return {site.name: 1 / _scale_of(site, powers[site.name], inputs, weights) for site in sites}


def _scale_of(site: ScaleSite, power: Tensor, inputs: float, weights: float) -> Tensor:
    """Returns s [C]; channels that are always zero, or that only zero weights read, keep their scale."""
    columns = torch.stack([w.detach().double().reshape(-1, w.shape[-1]).square().sum(dim=0) for w in site.readers])
    # In the sum of a site's readers each row counts once, whichever of them it is of.
    m, w = (site.narrow_to_mean(values).sqrt() for values in (power, columns.sum(dim=0)))
    alive = (m > 0) & (w > 0)
    scale = torch.ones_like(m)
    scale[alive] = m[alive] ** inputs / w[alive] ** weights
    if bool(alive.any()):
        scale[alive] /= scale[alive].log().mean().exp()
    return scale
