"""A tied embedding under rotation: one table for the embedding and the head, and a matrix before the head.

The embedding E [V, H] of a rotated decoder is E R. A head of its own becomes E diag(g) R, with g the weight of the last
norm: no rotation moves g past the norm, because norms commute with R only where all of their weights are equal. One
table can serve both when the rest of the head is a matrix of its own behind the norm:

    logits = norm(h) diag(g) E' = norm(h R) [R' diag(g) R] (E R)'.

That is H^2 weights more (SmolLM2-135M: 0.33 million) instead of the V H of a second table (28 million). The matrix
takes a format like the head that it is a part of. It is no part of the architecture: ``allocator.load`` rebuilds it,
and an engine that knows only the architecture cannot load it. For those the head can be untied first.
"""

from typing import Any

import torch
from torch import Tensor, nn

from runtime.transforms.decoder_blocks import find_decoder

_NORM = "model.norm"


class HeadMatrix(nn.Linear):
    """The part of a head that its table does not hold, which takes the formats of heads."""

    part_of_head = True


class MappedNorm(nn.Module):
    """A norm with a matrix behind it.

    Args:
        norm: The norm over H channels.
        map: The matrix [H, H], without bias.
    """

    def __init__(self, norm: nn.Module, map: HeadMatrix) -> None:
        super().__init__()
        self.norm = norm
        self.map = map

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns [..., H] for hidden states [..., H]."""
        mapped: Tensor = self.map(self.norm(hidden))
        return mapped


def untie_head_(model: Any) -> None:
    """Gives the head a table of its own, equal to the embedding's, in place; nothing where it has one already.

    Raises:
        ValueError: If the model is no decoder of the known kind.
    """
    decoder = find_decoder(model)
    if decoder.tied:
        decoder.head.weight = nn.Parameter(decoder.embedding.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def install_map_(model: nn.Module, *, device: torch.device | str | None = None) -> MappedNorm:
    """Puts a matrix behind the last norm, in place, and returns both; its values are undefined.

    Args:
        model: A decoder with its last norm at 'model.norm'.
        device: Where the matrix is; None for that of the norm's weight.
    """
    norm = model.get_submodule(_NORM)
    weight = norm.weight
    assert isinstance(weight, Tensor)
    width = len(weight)
    matrix = HeadMatrix(width, width, bias=False, device=device or weight.device, dtype=weight.dtype)
    mapped = MappedNorm(norm, matrix.requires_grad_(False))
    model.set_submodule(_NORM, mapped)
    return mapped


def has_map(model: nn.Module) -> bool:
    """Returns whether there is a matrix behind the last norm of a model."""
    return any(isinstance(module, MappedNorm) for module in model.modules())
