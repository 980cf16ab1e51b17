"""Rotation of the values inside each head: v_proj writes them, o_proj reads them, attention only averages them.

With R_h [d, d] orthogonal for key-value head h, and row vectors,

    rows of head h:  W_v -> R_h' W_v,  b_v -> b_v R_h;      columns of each query head of h:  W_o -> W_o R_h.

Attention adds values of one head with weights that the values do not enter, so no operation is needed when the model
runs; values in a cache of few bits profit as well. R_h is a randomised Hadamard matrix of head_dim (``hadamard``).
Complexity: d per weight.

Papers: Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456); Liu et al. 2024 (SpinQuant, arXiv:2405.16406), R2.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from runtime.transforms.decoder_blocks import find_blocks
from runtime.transforms.hadamard import make_hadamard_rotation


def find_head_rotations(model: nn.Module, tokens: Tensor | None, *, seed: int = 0) -> dict[str, Tensor]:
    """Returns block name -> a randomised Hadamard basis of each key-value head, [heads, d, d] float64.

    Args:
        model: The decoder.
        tokens: Not read.
        seed: Decides the signs.

    Raises:
        ValueError: If the model is no decoder of the known kind.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        block.name: torch.stack(
            [
                make_hadamard_rotation(block.head_dim, generator)
                for _ in range(block.attention["v_proj"].out_features // block.head_dim)
            ]
        )
        for block in find_blocks(model)
    }


def rotate_heads_(model: nn.Module, bases: Mapping[str, Tensor]) -> None:
    """Writes the values of every head in another basis, in place.

    Args:
        model: The decoder, on any device, in any floating-point dtype.
        bases: Block name -> [heads, d, d] float64, orthogonal.
    """
    with torch.no_grad():
        for block in find_blocks(model):
            value, output = block.attention["v_proj"], block.attention["o_proj"]
            R = bases[block.name].to(value.weight.device)
            written = value.weight.double().view(len(R), block.head_dim, -1)
            value.weight.copy_((R.mT @ written).view_as(value.weight))
            if value.bias is not None:
                by_head = value.bias.double().view(len(R), 1, block.head_dim)
                value.bias.copy_((by_head @ R).view_as(value.bias))
            read = output.weight.double().view(len(output.weight), len(R), block.repeats, block.head_dim)
            output.weight.copy_(torch.einsum("ohrd,hde->ohre", read, R).reshape(output.weight.shape))
