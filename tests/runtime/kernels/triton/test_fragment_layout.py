"""The layout of the Triton kernels against its definition, code by code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.kernels.triton.fragment_layout import (
    PAIRS,
    list_fields,
    pack_fragments,
    pack_words,
    pack_zeros,
    unpack_words,
    unpack_zeros,
)


def draw_codes(rows: int, count: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, count), dtype=torch.uint8, generator=generator)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 200), st.integers(0, 1000))
def test_codes_come_back(bits: int, rows: int, count: int, seed: int) -> None:
    codes = draw_codes(rows, count, bits, seed)
    assert torch.equal(unpack_words(pack_words(codes, bits), bits, (rows, count)), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_are_dense(bits: int) -> None:
    # 8 rows x 64 codes are one tile: every bit of its words is some bit of a code, and the sizes agree.
    words = pack_words(torch.full((8, 64), (1 << bits) - 1, dtype=torch.uint8), bits)
    assert words.shape == (1, bits, 1, 4, 4)
    assert bool((words == -1).all())
    assert words.numel() * 32 == 8 * 64 * bits


@pytest.mark.parametrize("bits", range(1, 9))
def test_fields_cover_a_half_word_once(bits: int) -> None:
    taken = [
        (word, bit + i)
        for pair in range(PAIRS)
        for word, bit, _, width in list_fields(pair, bits)
        for i in range(width)
    ]
    assert sorted(taken) == [(word, bit) for word in range(bits) for bit in range(16)]
    for pair in range(PAIRS):
        assert sum(width for _, _, _, width in list_fields(pair, bits)) == bits


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_a_code_is_where_the_tensor_core_wants_it(bits: int) -> None:
    """One code alone, at row 8 r + 2 v + j and k = 64 tile + 16 t + 8 h + 2 q + l, its word worked out by hand."""
    r, v, j, tile, t, h, q, half = 1, 2, 1, 1, 2, 1, 2, 1
    codes = torch.zeros((16, 128), dtype=torch.uint8)
    codes[8 * r + 2 * v + j, 64 * tile + 16 * t + 8 * h + 2 * q + half] = 1
    words = pack_words(codes, bits)
    pair, slots = 4 * t + 2 * h + j, 16 // bits
    assert pair < bits * slots, "the pair lies in whole slots"
    expected = torch.zeros_like(words)
    expected[tile, pair // slots, r, q, v] = 1 << (pair % slots * bits + 16 * half)
    assert torch.equal(words, expected)


def test_scales_and_zero_points_are_transposed_and_padded() -> None:
    scale, zero = torch.rand(13, 3).to(torch.float16), draw_codes(13, 3, 4)
    weight = pack_fragments(draw_codes(13, 96, 4), scale, zero, bits=4, group_size=32)
    assert weight.zero_point is not None
    # 96 codes are padded to two tiles of 64, so there is a fourth group that the kernels read.
    assert weight.scale.shape == (4, 16)
    assert torch.equal(weight.scale[:3, :13], scale.t())
    assert torch.equal(unpack_zeros(weight.zero_point, 4, 13)[:3], zero.t())
    assert float(weight.scale[3:].sum() + weight.scale[:, 13:].sum()) == 0.0
    assert weight.read_bytes == 4 * 2 * 16 * 64 // 8 + 4 * 16 * 2 + 4 * 16 // 2
    symmetric = pack_fragments(draw_codes(13, 96, 4), scale, None, bits=4, group_size=32)
    assert symmetric.read_bytes == weight.read_bytes - 4 * 16 // 2
    # The kernels read scales as whole 32-bit words, one group included.
    single = pack_fragments(draw_codes(3, 97, 4), scale[:3, :1], zero[:3, :1], bits=4, group_size=None)
    assert single.scale.view(torch.int32).shape == (1, 4)


@pytest.mark.parametrize(("bits", "width"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (6, 8), (7, 8), (8, 8)])
def test_zero_points_follow_each_other_in_words(bits: int, width: int) -> None:
    # 37 rows fill no whole words: row 33 of group 1 lies (33 mod fields) fields above the lowest bit of its word.
    zeros = torch.zeros((2, 37), dtype=torch.uint8)
    zeros[1, 33] = (1 << bits) - 1
    words, each = pack_zeros(zeros, bits), 32 // width
    assert words.dtype == torch.int32
    assert words.shape == (2, -(-37 // each))
    expected = torch.zeros_like(words)
    expected[1, 33 // each] = torch.tensor(((1 << bits) - 1) << (33 % each * width)).to(torch.int32)
    assert torch.equal(words, expected)
    drawn = draw_codes(2, 37, bits)
    assert torch.equal(unpack_zeros(pack_zeros(drawn, bits), bits, 37), drawn)


def test_what_the_kernels_cannot_take_is_refused() -> None:
    codes, scale = draw_codes(8, 96, 4), torch.ones(8, 1)
    with pytest.raises(ValueError, match="bits must be from 1 to 8: got bits=9"):
        pack_fragments(codes, scale, None, bits=9, group_size=None)
    with pytest.raises(ValueError, match="got group_size=48, in_features=96"):
        pack_fragments(codes, scale, None, bits=4, group_size=48)
    with pytest.raises(ValueError, match="got group_size=64, in_features=96"):
        pack_fragments(codes, scale, None, bits=4, group_size=64)
