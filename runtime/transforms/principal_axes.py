"""Principal axes of the residual stream: the directions of most input power come first, each part spread inside itself.

M is the second moment of the inputs of attention and MLP, norm weights left out, over all blocks; U its eigenvectors by
falling eigenvalue. With the first ``round(share * H)`` of them as the part of high power,

    R = U blockdiag(Q_high, Q_low),      Q: randomised Hadamard inside each part,

folded like any rotation (``residual_rotation``). A part of few channels then holds most of the power of what linear
layers read. ResQ stores that part of every weight and activation at 8 bits and the rest at 4; here the columns of one
weight share a format, and what is left of the idea is that the groups of high power are groups of their own.

Complexity: one run of the text, H^3. The basis is not unique where eigenvalues are equal: it is kept, not made again.

Paper: Saxena et al. 2024 (ResQ, arXiv:2412.14363), with one basis for all layers and without its online
rotations.
"""

import torch
from torch import Tensor, nn

from runtime.transforms.decoder_blocks import find_decoder
from runtime.transforms.hadamard import make_hadamard_rotation
from runtime.transforms.observation import observe_inputs
from runtime.transforms.residual_rotation import ROTATION


def find_principal_rotation(
    model: nn.Module, tokens: Tensor | None, *, share: float = 0.125, seed: int = 0
) -> dict[str, Tensor]:
    """Returns the basis [H, H] float64 of the residual stream.

    Args:
        model: The decoder.
        tokens: [S, T] int64 of calibration text.
        share: Part of the channels that the directions of most power get, between 0 and 1.
        seed: Decides the signs.

    Raises:
        ValueError: If the share leaves a part empty, there is no text, or the model is no decoder of the known kind.
    """
    width = find_decoder(model).embedding.embedding_dim
    high = round(share * width)
    if not 0 < high < width:
        msg = f"share must leave channels to both parts: got share={share} of {width} channels. Use 0.125."
        raise ValueError(msg)
    powers, axes = torch.linalg.eigh(measure_residual_moment(model, tokens))
    generator = torch.Generator().manual_seed(seed)
    by_power = axes[:, powers.argsort(descending=True)]
    parts = (by_power[:, :high], by_power[:, high:])
    return {ROTATION: torch.cat([part @ make_hadamard_rotation(part.shape[1], generator) for part in parts], dim=1)}


def measure_residual_moment(model: nn.Module, tokens: Tensor | None) -> Tensor:
    """Returns the sum of x x' [H, H] float64 over what every block's norms read, divided by its own length."""
    decoder = find_decoder(model)
    width = decoder.embedding.embedding_dim
    moment = torch.zeros(width, width, dtype=torch.float64)

    def see(_: str, hidden: Tensor) -> None:
        wide = hidden.double()
        wide = wide * wide.pow(2).mean(dim=-1, keepdim=True).clamp(min=1e-30).rsqrt()
        moment.add_(wide.T @ wide)

    norms = {
        f"{block.name} {i}": norm
        for block in decoder.blocks
        for i, norm in enumerate((block.attention_norm, block.mlp_norm))
    }
    observe_inputs(model, tokens, norms, see)
    return moment
