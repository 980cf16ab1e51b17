"""Sums of parts in the kernels' layout: each part is an integer weight, and its scales lie where the kernel reads."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.kernels.triton.fragment_layout import unpack_words
from runtime.kernels.triton.parted_layout import CodePart, count_tiles, pack_parts


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 20),
    groups=st.integers(1, 5),
    length=st.sampled_from([16, 32, 64, 97, 128]),
    bits=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    each_scaled=st.booleans(),
    powers=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_parts_are_read_back(
    rows: int, groups: int, length: int, bits: list[int], each_scaled: bool, powers: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    group_size = None if length == 97 else length
    groups = 1 if group_size is None else groups
    shape = (rows, groups * length)
    codes = [torch.randint(0, 1 << b, shape, dtype=torch.uint8, generator=generator) for b in bits]
    numbers = torch.randint(1, 255, (rows, groups, len(bits)), dtype=torch.uint8, generator=generator)
    scale = numbers.view(torch.float8_e8m0fnu) if powers else numbers.to(torch.float16)
    scale = scale if each_scaled else scale[..., 0]
    weight = pack_parts(codes, scale, [CodePart(bits=b, zero=0.0, factor=1.0) for b in bits], group_size=group_size)
    tiles, first = count_tiles(shape[1]), 0
    for b, expected in zip(bits, codes, strict=True):
        last = first + tiles * b
        words = weight.words[first:last].view(tiles, b, *weight.words.shape[1:])
        assert torch.equal(unpack_words(words, b, shape), expected)
        first = last
    assert first == len(weight.words) == tiles * weight.bits
    read = weight.scale.float().view(-1, len(bits) if each_scaled else 1, weight.scale.shape[1])
    wanted = scale.float().view(rows, groups, -1).permute(1, 2, 0)
    assert torch.equal(read[:groups, :, :rows], wanted)
    # Nothing follows but zeros: of powers of two the least, which is read as zero.
    assert not bool((weight.scale.view(-1, read.shape[1], read.shape[2])[groups:].float() > 2.0**-126).any())
    assert weight.read_bytes == 4 * weight.words.numel() + weight.scale.numel() * (1 if powers else 2)
