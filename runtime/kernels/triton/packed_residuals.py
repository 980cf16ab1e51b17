"""The product of activations with a packed weight that is a sum of residual blocks, its signs read once each."""

import torch
from torch import Tensor

from runtime.kernels.triton.fragment_layout import pack_words
from runtime.kernels.triton.kept_layout import Packed, find_kept, stored_tensors
from runtime.kernels.triton.residual_linear import MOST_RANK_ROWS, ResidualBlocks, residual_linear
from runtime.packing import unpack_codes

_MOST_TOKENS = 512


def multiply_residual_blocks(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor | None:
    """Returns x W' + bias in the type of x; None for more rows of x, or a higher rank, than the kernel takes.

    Each row of x becomes as many rows as the rank, twice that for float32. Reckoned for an A100, 4096 x 4096 weights
    and four blocks of rank 16, a row takes 6 us, and to dequantize the weight in PyTorch takes 9 ms.

    Args:
        x: [..., in_features] float16, bfloat16 or float32.
        weight: A packed weight of kind ``residual_blocks``.
        bias: [out_features], or None.
    """
    if 2 * weight.format.rank > MOST_RANK_ROWS or x.numel() > _MOST_TOKENS * x.shape[-1]:
        return None
    blocks = find_kept(weight, make_residual_blocks)
    return None if blocks is None else residual_linear(x, blocks, bias)


def make_residual_blocks(weight: Packed) -> ResidualBlocks:
    """Returns residual blocks in the layout of the Triton kernels; the factors are those that are stored."""
    tensors = stored_tensors(weight)
    signs = [pack_words(unpack_codes(block, 1, weight.shape[1]), 1).squeeze(1) for block in tensors["codes"]]
    return ResidualBlocks(words=torch.stack(signs), left=tensors["left"], right=tensors["right"])
