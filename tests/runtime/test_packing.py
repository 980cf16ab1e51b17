"""Packed codes against a bit string made by numpy, bit by bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime import packing
from runtime.packing import pack_codes, pack_trits, unpack_codes, unpack_trits

WIDTHS = range(1, 9)


def reference_pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Returns every row as one little-endian bit string, lowest bit of each code first."""
    bit_string = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(bit_string.reshape(codes.shape[0], -1), axis=1, bitorder="little")


def draw_codes(rows: int, count: int, bits: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, count), dtype=np.uint8)


@settings(deadline=None)
@given(bits=st.sampled_from(WIDTHS), rows=st.integers(1, 5), count=st.integers(1, 67), seed=st.integers(0, 2**32 - 1))
def test_any_shape_agrees_with_the_bit_string(bits: int, rows: int, count: int, seed: int) -> None:
    codes = draw_codes(rows, count, bits, seed)
    packed = pack_codes(torch.from_numpy(codes), bits)
    assert np.array_equal(packed.numpy(), reference_pack(codes, bits))
    assert np.array_equal(unpack_codes(packed, bits, count).numpy(), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("fill", ["zeros", "ones"])
def test_extreme_codes(bits: int, fill: str) -> None:
    code = 0 if fill == "zeros" else (1 << bits) - 1
    codes = torch.full((2, 11), code, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    # The padding of a row is zero bits, whatever the codes are.
    assert packed.sum(-1).tolist() == [int(reference_pack(codes.numpy(), bits)[0].sum())] * 2
    assert torch.equal(unpack_codes(packed, bits, 11), codes)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize(
    "shape",
    [
        (2, packing._BLOCK_CODES // 2 + 1),  # blocks of one row
        (packing._BLOCK_CODES // 1021 + 3, 1021),  # a full block and one of a few rows
        (1, packing._BLOCK_CODES + 5),  # a row longer than a block
    ],
    ids=["row_blocks", "last_block_short", "long_row"],
)
def test_blocks_join_without_a_seam(bits: int, shape: tuple[int, int]) -> None:
    codes = draw_codes(*shape, bits)
    packed = pack_codes(torch.from_numpy(codes), bits)
    assert np.array_equal(packed.numpy(), reference_pack(codes, bits))
    assert np.array_equal(unpack_codes(packed, bits, shape[1]).numpy(), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_tensors_that_are_not_contiguous(bits: int) -> None:
    codes = torch.from_numpy(draw_codes(37, 26, bits))
    for view in (codes.T, codes[:, ::2], codes[::3], codes[:, 1:18], codes[:1].expand(4, -1)):
        expected = view.contiguous().numpy()
        packed = pack_codes(view, bits)
        assert np.array_equal(packed.numpy(), reference_pack(expected, bits))
        wide = torch.cat([packed, packed], dim=1)[:, : packed.shape[1]]
        for packed_view in (wide, packed.T.contiguous().T):
            assert np.array_equal(unpack_codes(packed_view, bits, view.shape[1]).numpy(), expected)


@pytest.mark.parametrize("bits", WIDTHS)
def test_some_rows_unpack_as_they_do_among_all(bits: int) -> None:
    codes = torch.from_numpy(draw_codes(9, 13, bits))
    rows = torch.tensor([8, 0, 0, 3])
    assert torch.equal(unpack_codes(pack_codes(codes, bits)[rows], bits, 13), codes[rows])


@settings(deadline=None)
@given(rows=st.integers(1, 5), count=st.integers(1, 67), seed=st.integers(0, 2**32 - 1))
def test_trits_are_numbers_of_base_three(rows: int, count: int, seed: int) -> None:
    trits = np.random.default_rng(seed).integers(0, 3, (rows, count), dtype=np.uint8)
    packed = pack_trits(torch.from_numpy(trits)).numpy()
    # The first digit of five is the lowest; the last byte of a row is filled up with zeros.
    texts = ["".join(map(str, row)).ljust(-(-count // 5) * 5, "0") for row in trits]
    assert packed.tolist() == [[int(text[i : i + 5][::-1], 3) for i in range(0, len(text), 5)] for text in texts]
    assert np.array_equal(unpack_trits(torch.from_numpy(packed), count).numpy(), trits)
