"""Progressive residual blocks: each block stores the signs of what is left and its magnitudes at a low rank.

    W ~ sum_b S_b * (U_b V_b),     S_b = sign(R_b),   U_b V_b = |R_b| at rank k,   R_b = W - what the blocks before gave

A block takes one bit a weight and 16 k (m + n) bits for its two factors; a weight of few rows or columns has the rank
min(k, m, n). Blocks are in order of use: the first of them are the same weight in fewer bits, which is what makes the
format fit any memory. The best rank-k factors of the magnitudes, weighted by the importance h of the columns, are those
of |R_b| diag(sqrt h), by the eigenvectors of its smaller Gram matrix in float64; V_b is divided by sqrt h again. The
next residual is taken after rounding the factors to float16, so the error of a block is the tail of the singular values
of its magnitudes, and what rounding adds. Time O(m n min(m, n)) a block.

Paper: Wang et al. 2024 (BitStack, arXiv:2410.23918), with 16 blocks of rank 16.
"""

import torch
from torch import Tensor

from runtime.codecs.codec import Codec, StoredTensors, check_range
from runtime.packing import pack_codes, unpack_codes
from runtime.quantizers.grid import LARGEST_SCALE
from runtime.storage import Format

# Of the mean importance: a column that hardly counts must not ask for a factor beyond float16.
_LEAST_IMPORTANCE = 1e-4


def encode_residual_blocks(weight: Tensor, format_: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Returns the signs and factors of all blocks.

    Raises:
        ValueError: If a weight is not finite or beyond float16.
    """
    check_range(weight, format_, LARGEST_SCALE)
    h = torch.ones(weight.shape[1]) if importance is None else importance
    root = (h / h.mean()).clamp(min=_LEAST_IMPORTANCE).sqrt()
    residual, signs, left, right = weight, [], [], []
    for _ in range(format_.bits):
        positive = residual >= 0
        U, V = _factorize(residual.abs(), root, min(format_.rank, *weight.shape))
        signs.append(pack_codes(positive.to(torch.uint8), 1))
        left.append(U)
        right.append(V)
        residual = residual - _signed(positive, _product(U, V))
    return {"codes": torch.stack(signs), "left": torch.stack(left), "right": torch.stack(right)}


def decode_residual_blocks(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the sum of all blocks."""
    return read_blocks(tensors, shape, format_.bits, rows)


def residual_block_codes(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the signs as uint8, bit b those of block b."""
    codes = _read_signs(tensors, shape, 0, rows)
    for block in range(1, format_.bits):
        codes = codes | _read_signs(tensors, shape, block, rows) << block
    return codes


def read_blocks(tensors: StoredTensors, shape: tuple[int, int], blocks: int, rows: Tensor | None = None) -> Tensor:
    """Returns the float32 weight that the first ``blocks`` blocks stand for, or some of its rows.

    Raises:
        ValueError: If there are not as many blocks.
    """
    stored = len(tensors["codes"])
    if not 1 <= blocks <= stored:
        msg = f"blocks must be between 1 and those that are stored: got blocks={blocks}, stored={stored}. Read fewer."
        raise ValueError(msg)
    total: Tensor | None = None
    for block in range(blocks):
        U, V = tensors["left"][block], tensors["right"][block]
        positive = _read_signs(tensors, shape, block, rows).bool()
        values = _signed(positive, _product(U if rows is None else U[rows], V))
        total = values if total is None else total.add_(values)
    assert total is not None
    return total


def _read_signs(tensors: StoredTensors, shape: tuple[int, int], block: int, rows: Tensor | None) -> Tensor:
    signs = tensors["codes"][block]
    return unpack_codes(signs if rows is None else signs[rows], 1, shape[1])


def _signed(positive: Tensor, values: Tensor) -> Tensor:
    return torch.where(positive, values, -values)


def _product(U: Tensor, V: Tensor) -> Tensor:
    """Returns U V in float32, one rank after the other: a row of it never depends on the rows beside it."""
    U, V = U.to(torch.float32), V.to(torch.float32)
    product = U[:, :1] * V[:1]
    for k in range(1, U.shape[1]):
        product += U[:, k : k + 1] * V[k : k + 1]
    return product


def _factorize(magnitudes: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns float16 U [rows, rank] and V [rank, in_features] of the best weighted approximation of the magnitudes."""
    weighted = (magnitudes * root).double()
    tall = weighted.shape[0] >= weighted.shape[1]
    gram = weighted.T @ weighted if tall else weighted @ weighted.T
    values, vectors = torch.linalg.eigh(gram)
    # The square roots of the singular values balance the factors.
    balance = values[-rank:].clamp(min=0.0).pow(0.25)
    basis, inverse = vectors[:, -rank:], torch.where(balance > 0, 1 / balance, 0.0)
    if tall:
        U, V = weighted @ basis * inverse, (basis * balance).T
    else:
        U, V = basis * balance, (weighted.T @ basis * inverse).T
    return U.to(torch.float16), (V / root).clamp(-LARGEST_SCALE, LARGEST_SCALE).to(torch.float16)


RESIDUAL_BLOCKS = Codec(encode=encode_residual_blocks, decode=decode_residual_blocks, codes=residual_block_codes)
