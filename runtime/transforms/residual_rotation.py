"""Rotation of the residual stream: every matrix that reads it or writes to it, in another orthogonal basis.

With R [H, H] orthogonal and row vectors h, an RMS norm without weights satisfies norm(h R) = norm(h) R. So the norms'
weights g go into what reads them, and then

    embedding E R;   readers W diag(g) R;   writers R' W, their biases b R;   head W diag(g) R,

and no activation is rotated when the model runs. A head that is tied to the embedding gets a matrix before it instead
(``tied_head``), unless it was untied first. A rotation spreads single large channels over all of them; what a format
loses on a group of weights or activations then depends less on its largest.

Hadamard or random orthogonal bases (``hadamard``) are drawn by a seed. Complexity: H per weight; one parameter's rows
in float64 at a time, and one rounding to its own dtype. Biases and routers, which take no format, are then no longer
exact in bfloat16 and take four bytes each in the packed file.

Papers: Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456), without its online rotations; Liu et al. 2024
(SpinQuant, arXiv:2405.16406), R1, which is learned there.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from runtime.transforms.decoder_blocks import Decoder, check_root_mean_square_norm, find_decoder
from runtime.transforms.hadamard import make_hadamard_rotation, make_random_orthogonal
from runtime.transforms.tied_head import MappedNorm, install_map_

ROTATION = "rotation"
_ROWS = 8192  # of a parameter in float64 at a time


def find_hadamard_rotation(model: nn.Module, tokens: Tensor | None, *, seed: int = 0) -> dict[str, Tensor]:
    """Returns a randomised Hadamard basis [H, H] float64 of the residual stream.

    Args:
        model: The decoder.
        tokens: Not read.
        seed: Decides the signs.

    Raises:
        ValueError: If the model is no decoder of the known kind.
    """
    width = find_decoder(model).embedding.embedding_dim
    return {ROTATION: make_hadamard_rotation(width, torch.Generator().manual_seed(seed))}


def find_random_rotation(model: nn.Module, tokens: Tensor | None, *, seed: int = 0) -> dict[str, Tensor]:
    """Returns a random orthogonal basis [H, H] float64 of the residual stream.

    Args:
        model: The decoder.
        tokens: Not read.
        seed: Decides the basis.

    Raises:
        ValueError: If the model is no decoder of the known kind.
    """
    width = find_decoder(model).embedding.embedding_dim
    return {ROTATION: make_random_orthogonal(width, torch.Generator().manual_seed(seed))}


def rotate_residual_(model: nn.Module, bases: Mapping[str, Tensor]) -> None:
    """Writes a decoder in another basis of its residual stream, in place.

    Args:
        model: The decoder, on any device, in any floating-point dtype.
        bases: ``ROTATION`` -> R [H, H] float64, orthogonal.

    Raises:
        ValueError: If the model is no decoder of the known kind, or one of its norms is no RMS norm.
    """
    decoder, R = find_decoder(model), bases[ROTATION]
    norms = _list_norms(decoder)
    for name, norm in norms.items():
        check_root_mean_square_norm(name, norm)
    with torch.no_grad():
        _rotate_head_(model, decoder, R)
        _multiply_rows_(decoder.embedding.weight, R)
        for block in decoder.blocks:
            read_attention = tuple(block.attention[part].weight for part in ("q_proj", "k_proj", "v_proj"))
            for norm, readers in ((block.attention_norm, read_attention), (block.mlp_norm, block.mlp.readers)):
                _fold_and_rotate_(norm, readers, R)
            output = block.attention["o_proj"]
            for writer in (output.weight, *block.mlp.writers):
                _multiply_columns_(writer, R)
            for bias in (output.bias, *block.mlp.biases):
                if bias is not None:
                    _multiply_rows_(bias, R)


def _list_norms(decoder: Decoder) -> dict[str, nn.Module]:
    final = decoder.final_norm
    norms = {"model.norm": final.norm if isinstance(final, MappedNorm) else final}
    for block in decoder.blocks:
        norms[f"{block.name}.input_layernorm"] = block.attention_norm
        norms[f"{block.name}.post_attention_layernorm"] = block.mlp_norm
    return norms


def _rotate_head_(model: nn.Module, decoder: Decoder, R: Tensor) -> None:
    final = decoder.final_norm
    if not decoder.tied and not isinstance(final, MappedNorm):
        _fold_and_rotate_(final, (decoder.head.weight,), R)
        return
    if not isinstance(final, MappedNorm):
        final = install_map_(model)
        final.map.weight.copy_(torch.eye(len(R)))
    _fold_and_rotate_(final.norm, (final.map.weight,), R)
    if decoder.tied:
        _multiply_columns_(final.map.weight, R)


def _fold_and_rotate_(norm: nn.Module, readers: tuple[Tensor, ...], R: Tensor) -> None:
    """Moves the weight of a norm and the basis into what reads the norm: one product, one rounding."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    factor = weight.double()[:, None] * R.to(weight.device)
    for reader in readers:
        _multiply_rows_(reader, factor)
    weight.fill_(1.0)


def _multiply_rows_(tensor: Tensor, matrix: Tensor) -> None:
    """Replaces every row w of a tensor [..., H] by w times the matrix [H, H]."""
    matrix = matrix.to(tensor.device)
    for rows in torch.split(tensor.detach().view(-1, tensor.shape[-1]), _ROWS):
        rows.copy_(rows.double() @ matrix)


def _multiply_columns_(tensor: Tensor, R: Tensor) -> None:
    """Replaces every matrix W of a tensor [..., H, in] by R' W."""
    basis = R.to(tensor.device)
    for matrix in tensor.detach().view(-1, *tensor.shape[-2:]):
        matrix.copy_(basis.T @ matrix.double())
