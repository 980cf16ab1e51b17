"""Smoothing: channels of large activations are divided, the weights that read them multiplied by the same.

With X_c the inputs and W_c the weights of channel c, and an exponent alpha between 0 and 1,

    s_c = max|X_c|^alpha / max|W_c|^(1 - alpha),      X diag(1/s), diag(s) W,

folded into what writes the channel: the norm before q, k, v and gate, up (or router and experts), the value projection
before o, the up projection before down. alpha = 0.5 is SmoothQuant. alpha = 1 gives every channel of the activations
the same largest magnitude: per-channel activation scales moved into the weights, which is what OutlierTune and, on the
norms alone, MergeQuant's quantization step migration do. Their other parts are not here: OutlierTune's shift of the
channels' centres needs a bias in the norm, MergeQuant's splitting of wide channels changes shapes.

The factors' geometric mean is set to 1, which changes no ratio. Channels that are always zero, or that only zero
weights read, keep their scale. Complexity: one run of the text.

What it is for: activations that are quantized themselves. Weights alone get harder to quantize where alpha is large.

Papers: Xiao et al. 2022 (SmoothQuant, arXiv:2211.10438, equation 4); Wang et al. 2024 (OutlierTune, arXiv:2406.18832);
Wang et al. 2025 (MergeQuant, arXiv:2503.07654).
"""

import torch
from torch import Tensor, nn

from runtime.transforms.observation import observe_inputs
from runtime.transforms.scale_folding import ScaleSite, largest_columns, list_scale_sites

# Site choice -> ends of the names of the modules that write.
SITES = {"all": ("",), "norms": ("layernorm",)}


def find_smoothing(
    model: nn.Module, tokens: Tensor | None, *, alpha: float = 0.5, sites: str = "all"
) -> dict[str, Tensor]:
    """Returns site name -> the factors 1/s [C] float64 of what writes the channels.

    Args:
        model: The decoder.
        tokens: [S, T] int64 of calibration text.
        alpha: Share of the difficulty that weights take over, 0 to 1.
        sites: ``all``, or ``norms`` for those before linear layers that read a norm.

    Raises:
        ValueError: If an option is out of range, there is no text, or the model is no decoder of the known kind.
    """
    if not 0 <= alpha <= 1:
        msg = f"alpha must be between 0 and 1: got alpha={alpha}. Use 0.5."
        raise ValueError(msg)
    if sites not in SITES:
        msg = f"sites must be one of {', '.join(SITES)}: got '{sites}'. Correct the name."
        raise ValueError(msg)
    chosen = [site for site in list_scale_sites(model) if site.name.endswith(SITES[sites])]
    largest = measure_largest_inputs(model, tokens, chosen)
    return {site.name: _factor(site, largest[site.name], alpha) for site in chosen}


def measure_largest_inputs(
    model: nn.Module, tokens: Tensor | None, sites: list[ScaleSite] | tuple[ScaleSite, ...]
) -> dict[str, Tensor]:
    """Returns site name -> max |X| [C] float64 of every channel on the text."""
    largest: dict[str, Tensor] = {}

    def see(name: str, inputs: Tensor) -> None:
        found = inputs.abs().amax(dim=0).double()
        largest[name] = torch.maximum(largest[name], found) if name in largest else found

    observe_inputs(model, tokens, {site.name: site.observed for site in sites}, see)
    return {site.name: site.narrow_to_largest(largest[site.name]) for site in sites}


def _factor(site: ScaleSite, activation: Tensor, alpha: float) -> Tensor:
    weight = site.narrow_to_largest(largest_columns(site.readers))
    alive = (activation > 0) & (weight > 0)
    scale = torch.ones_like(activation)
    scale[alive] = activation[alive] ** alpha / weight[alive] ** (1 - alpha)
    if bool(alive.any()):
        scale[alive] /= scale[alive].log().mean().exp()
    return 1 / scale
