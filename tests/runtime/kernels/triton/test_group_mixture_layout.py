"""Groups of 2 and 4 bits in the kernels' layout: read back as the kernel reads them, whatever groups are wide."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.kernels.triton.fragment_layout import unpack_words, unpack_zeros
from runtime.kernels.triton.group_mixture_layout import MixedGroups, pack_mixed_groups


def read_back(mixed: MixedGroups) -> Tensor:
    """Returns the weight [out_features, in_features] in float64, group by group as flags and starts say."""
    rows, columns = mixed.shape
    length, groups = mixed.group_size, columns // mixed.group_size
    high = unpack_words(mixed.words, 2, mixed.shape).view(rows, groups, length).double()
    scale, zero = mixed.scale.double().t(), unpack_zeros(mixed.zero_point, 2, rows).double().t()
    weight = scale[:rows, :groups, None] * (high - zero[:, :groups, None])
    halves = mixed.low_words.shape[0]
    # Half tiles two by two are tiles of two words.
    padded = torch.nn.functional.pad(mixed.low_words, (0, 0, 0, 0, 0, 0, 0, halves % 2))
    low = unpack_words(padded.view(-1, 2, *padded.shape[1:]), 2, (rows, 32 * halves)).double()
    low = low.view(rows, 32 * halves // length, length)
    zero_low = unpack_zeros(mixed.low_zero, 2, rows).double().t()
    for row in range(rows):
        for group in range(groups):
            flags = int(mixed.flags[group // 32, row // 16]) & 0xFFFFFFFF
            if flags >> group % 32 & 1:
                before = (flags & ((1 << group % 32) - 1)).bit_count()
                place = int(mixed.starts[group // 32, row // 16]) + before
                weight[row, group] += scale[row, group] / 4 * (low[row, place] - zero_low[row, place])
    weight = weight.reshape(rows, columns)
    return weight.scatter_add(1, mixed.outlier_column.t().to(torch.int64) & 0xFFFF, mixed.outlier.t().double())


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 70),
    length=st.sampled_from([32, 64]),
    share=st.floats(0, 1),
    outliers=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_mixed_groups_are_read_back(
    rows: int, groups: int, length: int, share: float, outliers: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    blocks, count = -(-rows // 16), int(share * groups)
    order = torch.rand(blocks, groups, generator=generator).argsort(1)
    wide = torch.zeros(blocks, groups, dtype=torch.bool).scatter_(1, order[:, :count], True)
    of_rows = wide.repeat_interleave(16, dim=0)[:rows]
    most = torch.where(of_rows, 16, 4)
    codes = torch.randint(0, 16, (rows, groups, length), generator=generator) % most.unsqueeze(-1)
    zero_point = torch.randint(0, 16, (rows, groups), generator=generator) % most
    scale = (torch.rand(rows, groups, generator=generator) + 0.1).to(torch.float16)
    expected = (scale.double().unsqueeze(-1) * (codes - zero_point.unsqueeze(-1)).double()).flatten(1)
    narrow = (~of_rows).repeat_interleave(length, dim=1)
    columns = (narrow * torch.rand(rows, groups * length, generator=generator)).topk(outliers if count < groups else 0)
    values = torch.randn(columns.indices.shape, generator=generator).to(torch.float16)
    expected.scatter_(1, columns.indices, values.double())
    mixed = pack_mixed_groups(codes.to(torch.uint8), scale, zero_point.to(torch.uint8), wide, values, columns.indices)
    # Scales of 11 bits times whole numbers are exact in float64.
    assert torch.equal(read_back(mixed), expected)
