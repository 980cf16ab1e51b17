"""Residual blocks against numpy's singular values: each block's error is the tail of its magnitudes."""

import numpy as np
import pytest
import torch

from runtime.codecs.residual_blocks import (
    decode_residual_blocks,
    encode_residual_blocks,
    read_blocks,
    residual_block_codes,
)
from runtime.formats import FORMATS, Format
from runtime.packing import unpack_codes
from tests.runtime.codecs.cases import WEIGHTS, Array, encode
from tests.runtime.quantizers.cases import draw_statistics

FAMILY = [f for f in FORMATS.values() if f.kind == "residual_blocks"]
# One row, one weight, rows and columns fewer than the rank, tall, wide, primes.
SHAPES = [(1, 1), (1, 97), (3, 64), (97, 2), (53, 20), (20, 53)]


def norm(values: Array) -> float:
    """Returns the Frobenius norm."""
    return float(np.linalg.norm(values))


@pytest.mark.parametrize("format_", FAMILY, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_error_of_a_block_is_the_tail_of_its_magnitudes(
    format_: Format, shape: tuple[int, int], weighted: bool
) -> None:
    weight = WEIGHTS["normal"](*shape)
    importance = draw_statistics(shape[1]).hessian().diagonal() if weighted else None
    root = np.sqrt(np.ones(shape[1]) if importance is None else importance.double().numpy())
    tensors = encode(weight, format_.name, importance)
    numbers, before = weight.double().numpy(), np.zeros(shape)
    for block in range(1, format_.bits + 1):
        now = read_blocks(tensors, shape, block).double().numpy()
        values = np.linalg.svd(np.abs(numbers - before) * root, compute_uv=False)
        tail = np.sqrt((values[format_.rank :] ** 2).sum())
        # Both factors are rounded to float16, by 2^-11 each of U V, whose largest singular value is the first; entries
        # below 2^-14 by 2^-25 of factors of norm up to the square root of it. Residuals are sums in float32.
        rounding = 2.0**-9 * np.sqrt((values[: format_.rank] ** 2).sum()) + 2.0**-18 * norm(numbers * root) + 1e-5
        error = norm((now - numbers) * root)
        assert tail - rounding <= error <= tail + rounding
        before = now
    assert torch.equal(decode_residual_blocks(tensors, format_, shape), read_blocks(tensors, shape, format_.bits))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_each_block_lowers_the_error(weights: str, weighted: bool) -> None:
    weight = WEIGHTS[weights](20, 53)
    importance = draw_statistics(53).hessian().diagonal() if weighted else None
    root = torch.ones(53) if importance is None else importance.sqrt()
    tensors = encode(weight, "bitstack4_r4", importance)
    errors = [((read_blocks(tensors, (20, 53), n) - weight) * root).norm().item() for n in (1, 2, 3, 4)]
    assert errors[0] < 0.8 * (weight * root).norm().item()
    assert all(later < 0.9 * earlier for earlier, later in zip(errors[:-1], errors[1:], strict=True))


def test_blocks_of_a_longer_format_are_those_of_a_shorter_one() -> None:
    weight, shape = WEIGHTS["normal"](20, 53), (20, 53)
    short, long = encode(weight, "bitstack2_r4"), encode(weight, "bitstack4_r4")
    assert all(torch.equal(short[name], long[name][:2]) for name in short)
    first_bytes = sum(tensor[:2].nbytes for tensor in long.values())
    assert first_bytes == FORMATS["bitstack2_r4"].storage_bytes(shape) == 2 * (20 * 7 + 2 * 4 * (20 + 53))


def test_first_signs_are_those_of_the_weight() -> None:
    weight, shape = WEIGHTS["outliers"](5, 97), (5, 97)
    tensors, format_ = encode(weight, "bitstack3_r4"), FORMATS["bitstack3_r4"]
    codes = residual_block_codes(tensors, format_, shape)
    assert torch.equal((codes & 1).bool(), weight >= 0)
    assert torch.equal(codes >> 2, unpack_codes(tensors["codes"][2], 1, 97))
    rows = torch.tensor([4, 0, 4])
    assert torch.equal(residual_block_codes(tensors, format_, shape, rows), codes[rows])
    whole = decode_residual_blocks(tensors, format_, shape)
    assert torch.equal(decode_residual_blocks(tensors, format_, shape, rows), whole[rows])


def test_columns_that_hardly_count_keep_factors_finite() -> None:
    importance = torch.logspace(-30, 3, 53)
    tensors = encode(WEIGHTS["large"](20, 53), "bitstack2_r16", importance)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


@pytest.mark.parametrize("blocks", [0, 3])
def test_blocks_that_are_not_stored_are_refused(blocks: int) -> None:
    tensors = encode(WEIGHTS["normal"](3, 5), "bitstack2_r4")
    with pytest.raises(ValueError, match=f"between 1 and those that are stored: got blocks={blocks}, stored=2"):
        read_blocks(tensors, (3, 5), blocks)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7e4], ids=str)
def test_weights_beyond_float16_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="range of format 'bitstack1_r4', at most 65504: got"):
        encode_residual_blocks(torch.tensor([[1.0, value]]), FORMATS["bitstack1_r4"])
