"""Random rescaling of channels inside a Llama-type decoder, which leaves its function as it is.

Problem: weights that were once stored on a low-bit grid (a model read from a 4-bit GGUF file) lie on it
still, and a format of the same grid seems to cost nothing. Off the grid, losses mean something again.

Formula: factors exp(sigma * N(0, 1)) per channel, folded as ``scale_folding`` does.
"""

import math

import torch
from torch import Tensor, nn

from runtime.transforms.scale_folding import fold_scales_, list_scale_sites


def apply_random_rescaling_(model: nn.Module, *, sigma: float = 0.25, seed: int = 0) -> None:
    """Folds random channel scales into the norms and linear layers of `model`, in place.

    Args:
        model: decoder with its blocks at `model.layers`, on any device, in any floating-point dtype.
        sigma: standard deviation of the logarithm of the scales, >= 0.
        seed: decides the scales, together with the shapes of the model.

    Raises:
        ValueError: sigma is negative or not finite, or the model is no decoder that ``decoder_blocks`` describes.
    """
    fold_scales_(model, draw_scales(model, None, sigma=sigma, seed=seed))


def draw_scales(model: nn.Module, tokens: Tensor | None, *, sigma: float = 0.25, seed: int = 0) -> dict[str, Tensor]:
    """Returns site name -> random factors [C] float64.

    Args:
        model: The decoder.
        tokens: Not read.
        sigma: Standard deviation of the logarithm of the factors, >= 0.
        seed: Decides the factors, together with the shapes of the model.

    Raises:
        ValueError: If sigma is negative or not finite, or the model is built otherwise.
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        msg = f"sigma must be a finite number >= 0: got sigma={sigma}. Use a value such as 0.25."
        raise ValueError(msg)
    generator = torch.Generator().manual_seed(seed)
    return {
        site.name: torch.exp(sigma * torch.randn(site.channels, generator=generator, dtype=torch.float64))
        for site in list_scale_sites(model)
    }
