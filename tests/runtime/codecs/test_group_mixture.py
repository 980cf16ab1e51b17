"""Groups of two widths and outliers: the best choice of groups by exhaustive search, each part that of its format."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.codecs.column_mixture import mixture_of
from runtime.codecs.group_mixture import decode_group_mixture, encode_group_mixture, group_mixture_codes
from runtime.formats import FORMATS, Format
from runtime.packing import unpack_codes
from runtime.storage import ROWS_OF_A_MASK
from tests.runtime.codecs.cases import WEIGHTS, encode, errors_by_group, render
from tests.runtime.quantizers.cases import draw_statistics

FAMILY = [f for f in FORMATS.values() if f.kind == "group_mixture"]
NAMES = [f.name for f in FAMILY]
# One row, a prime of blocks and rows, one group, two, several.
SHAPES = [(1, 64), (1, 640), (37, 128), (16, 320), (53, 640)]


def wide_weights(tensors: dict[str, Tensor], format_: Format, shape: tuple[int, int]) -> Tensor:
    """Returns which weights are in wide groups, [rows, in_features] bool."""
    groups = format_.group_count(shape[1])
    mask = unpack_codes(tensors["mask"], 1, groups).bool()
    return mask.repeat_interleave(ROWS_OF_A_MASK, 0)[: shape[0]].repeat_interleave(shape[1] // groups, 1)


def outliers_of(tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Returns which weights are outliers, [rows, in_features] bool."""
    found = torch.zeros(shape, dtype=torch.bool)
    if "outlier_index" in tensors:
        octets = tensors["outlier_index"].long()
        found.scatter_(1, octets[..., 0] + 256 * octets[..., 1], True)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_weight_is_what_its_width_makes_it(name: str, shape: tuple[int, int], weighted: bool) -> None:
    weight, format_ = WEIGHTS["outliers"](*shape), FORMATS[name]
    importance = draw_statistics(shape[1]).hessian().diagonal() if weighted else None
    h = torch.ones(shape[1]) if importance is None else importance
    tensors, rendered = encode(weight, name, importance), render(weight, name, importance)
    wide, outliers = wide_weights(tensors, format_, shape), outliers_of(tensors, shape)
    length = format_.group_size or 0
    assert not (wide & outliers).any()
    inliers = weight.clone()
    mean = weight.view(shape[0], -1, length).mean(-1).repeat_interleave(length, dim=1)
    inliers[outliers] = mean[outliers]
    expected = torch.where(wide, render(weight, f"int4_g{length}", h), render(inliers, f"int2_g{length}", h))
    expected[outliers] = weight[outliers].half().float()
    assert torch.equal(rendered, expected)
    assert (outliers.sum(1) == mixture_of(format_).outlier_count(int((~wide[0]).sum()))).all()


@pytest.mark.parametrize("shape", [(5, 64), (20, 128), (37, 256)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_other_groups_leave_less_error(shape: tuple[int, int], weighted: bool) -> None:
    """All choices of a quarter of the groups for a block of rows, each rendered alone."""
    name, groups = "int2_mix25int4_g32", shape[1] // 32
    weight = WEIGHTS["normal"](*shape)
    importance = draw_statistics(shape[1]).hessian().diagonal() if weighted else None
    h = torch.ones(shape[1]) if importance is None else importance
    found = errors_by_group(weight, render(weight, name, importance), name, h)
    wide = errors_by_group(weight, render(weight, "int4_g32", h), "int4_g32", h)
    narrow = errors_by_group(weight, render(weight, "int2_g32", h), "int2_g32", h)
    for start in range(0, shape[0], ROWS_OF_A_MASK):
        block = slice(start, start + ROWS_OF_A_MASK)
        least = np.inf
        for chosen in itertools.combinations(range(groups), round(groups / 4 + 1e-9)):
            mixed = narrow[block].copy()
            mixed[:, chosen] = wide[block][:, chosen]
            least = min(least, mixed.sum())
        # Gains are differences of float32 sums.
        assert found[block].sum() <= least + 2.0**-18 * narrow[block].sum()


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("weights", ["normal", "outliers", "large"])
def test_outliers_lower_the_error(group_size: int, weights: str) -> None:
    weight = WEIGHTS[weights](37, 640)
    name = f"int2_mix25int4_g{group_size}"
    with_outliers, without = (render(weight, n) - weight for n in (f"{name}_outliers", name))
    assert with_outliers.square().sum() < without.square().sum()


def test_planted_outliers_are_taken() -> None:
    weight, shape = WEIGHTS["normal"](37, 640), (37, 640)
    planted = torch.arange(37) % 31
    tensors, format_ = encode(weight, "int2_mix25int4_g64_outliers"), FORMATS["int2_mix25int4_g64_outliers"]
    wide = wide_weights(tensors, format_, shape)
    narrow_column = (~wide).long().argmax(1) + planted
    weight.scatter_(1, narrow_column.unsqueeze(1), 9.0)
    found = outliers_of(encode(weight, "int2_mix25int4_g64_outliers"), shape)
    again = wide_weights(encode(weight, "int2_mix25int4_g64_outliers"), format_, shape)
    # A planted weight is an outlier unless its group has become wide.
    assert (found | again).gather(1, narrow_column.unsqueeze(1)).all() and found.any()


def test_bytes_by_hand() -> None:
    # 10 groups of 64, three of them wide; 448 narrow weights, two outliers a row; 37 rows are three blocks.
    wide, narrow = 3 * (32 + 2) + 2, 7 * (16 + 2) + 2
    expected = 3 * 2 + 37 * (wide + narrow + 2 * (2 + 2))
    assert FORMATS["int2_mix25int4_g64_outliers"].storage_bytes((37, 640)) == expected
    tensors = encode(WEIGHTS["normal"](37, 640), "int2_mix25int4_g64_outliers")
    assert sum(tensor.nbytes for tensor in tensors.values()) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_read_alone(name: str, shape: tuple[int, int]) -> None:
    weight, format_ = WEIGHTS["normal"](*shape), FORMATS[name]
    tensors, rows = encode(weight, name), torch.tensor([shape[0] - 1, 0, shape[0] - 1, shape[0] // 2])
    assert torch.equal(decode_group_mixture(tensors, format_, shape, rows), render(weight, name)[rows])
    codes = group_mixture_codes(tensors, format_, shape)
    assert torch.equal(group_mixture_codes(tensors, format_, shape, rows), codes[rows])
    wide = wide_weights(tensors, format_, shape)
    assert int(codes.max()) < 16 and int(codes[~wide].max()) < 4


def test_places_of_two_bytes_reach_the_end_of_the_longest_row() -> None:
    weight, name = torch.zeros(1, 65536), "int2_mix25int4_g64_outliers"
    weight[0, -1], weight[0, 64:16448] = 5.0, WEIGHTS["normal"](1, 16384)[0] * 100
    tensors = encode(weight, name)
    assert outliers_of(tensors, (1, 65536))[0, -1] and render(weight, name)[0, -1] == 5.0


def test_longer_rows_are_refused() -> None:
    format_ = FORMATS["int2_mix25int4_g64_outliers"]
    assert format_.refusal(65600) == "outliers are found in up to 65536 columns, in_features=65600"
    assert FORMATS["int2_mix25int4_g64"].fits(65600)
    with pytest.raises(
        ValueError, match="at most 65536 weights: got in_features=65600 in format 'int2_mix25int4_g64_o"
    ):
        encode_group_mixture(torch.ones(1, 65600), format_)


def test_weights_that_cannot_be_stored_are_refused() -> None:
    with pytest.raises(ValueError, match="group_size=64, in_features=97 in format 'int2_mix25int4_g64'"):
        encode_group_mixture(torch.ones(1, 97), FORMATS["int2_mix25int4_g64"])
    with pytest.raises(ValueError, match="range of format 'int2_mix25int4_g64', at most 65504: got"):
        encode_group_mixture(torch.full((1, 64), 7e4), FORMATS["int2_mix25int4_g64"])
