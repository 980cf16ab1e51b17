"""Pre-shifted exponent biases: channels of activations meet one exponent bias by powers of two in the weights.

A grid of E exponent and M mantissa bits covers max|x| with the bias b = 2^E - log2 max|x| + log2(2 - 2^-M) - 1. Every
input channel c would want its own b_c; one bias b_min, that of the largest channel, is left for the tensor, and the
rest is an integer that weights can hold:

    k_c = clamp(round b_c, round b_min, round b_min + 2^E - 1) - round b_min,      X diag(2^k), diag(2^-k) W,

folded into what writes the channel. Powers of two change no mantissa: the logits stay the same to the bit, and weights
of bfloat16 keep their bits, unless a number leaves the range of its type. Complexity: one run of the text.

Paper: Liu et al. 2023 (LLM-FP4, arXiv:2310.16836), the pre-shifted exponent bias.
"""

import torch
from torch import Tensor, nn

from runtime.transforms.scale_folding import list_scale_sites
from runtime.transforms.smoothing import measure_largest_inputs


def find_exponent_biases(
    model: nn.Module, tokens: Tensor | None, *, exponent_bits: int = 2, mantissa_bits: int = 1
) -> dict[str, Tensor]:
    """Returns site name -> the powers of two [C] float64 that what writes the channels is multiplied by.

    Args:
        model: The decoder.
        tokens: [S, T] int64 of calibration text.
        exponent_bits: E, 1 to 5: shifts reach 2^E - 1.
        mantissa_bits: M, 0 to 10.

    Raises:
        ValueError: If an option is out of range, there is no text, or the model is no decoder of the known kind.
    """
    if not (1 <= exponent_bits <= 5 and 0 <= mantissa_bits <= 10):
        msg = (
            f"exponent_bits must be 1 to 5 and mantissa_bits 0 to 10: got exponent_bits={exponent_bits}, "
            f"mantissa_bits={mantissa_bits}. Use 2 and 1 for four bits."
        )
        raise ValueError(msg)
    largest = measure_largest_inputs(model, tokens, list_scale_sites(model))
    return {name: 2.0 ** _shifts(values, exponent_bits, mantissa_bits) for name, values in largest.items()}


def _shifts(largest: Tensor, exponent_bits: int, mantissa_bits: int) -> Tensor:
    """Returns k [C]; channels that are always zero are not shifted."""
    constant = torch.tensor(2.0 - 2.0**-mantissa_bits, dtype=torch.float64).log2() - 1
    bias = torch.round(2.0**exponent_bits - largest.log2() + constant)
    least = bias.min()
    shift = bias.clamp(max=least + 2.0**exponent_bits - 1) - least
    return torch.where(torch.isfinite(bias), shift, torch.zeros_like(shift))
