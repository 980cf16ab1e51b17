"""Columns of two widths: each part is its own format's, and the wide columns are those of the largest errors."""

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.codecs.column_mixture import (
    column_mixture_codes,
    decode_column_mixture,
    encode_column_mixture,
    mixture_of,
    read_column_mask,
)
from runtime.formats import FORMATS, Format
from tests.runtime.codecs.cases import WEIGHTS, encode, errors_by_group, render
from tests.runtime.quantizers.cases import draw_statistics

FAMILY = [f for f in FORMATS.values() if f.kind == "column_mixture"]
# Channels that divide nothing, one column, and as few as one group.
LENGTHS = {None: (1, 2, 5, 97), 64: (64, 320), 128: (128, 640)}
CASES = [(format_, in_features) for format_ in FAMILY for in_features in LENGTHS[format_.group_size]]
IDS = [f"{format_.name}-{in_features}" for format_, in_features in CASES]


def mask_of(weight: Tensor, name: str, importance: Tensor | None = None) -> Tensor:
    """Returns which columns are wide."""
    return read_column_mask(encode(weight, name, importance), (weight.shape[0], weight.shape[1]))


@pytest.mark.parametrize(("format_", "in_features"), CASES, ids=IDS)
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_parts_are_rendered_by_their_formats(format_: Format, in_features: int, rows: int, weighted: bool) -> None:
    weight = WEIGHTS["outliers"](rows, in_features)
    importance = draw_statistics(in_features).hessian().diagonal() if weighted else None
    h = torch.ones(in_features) if importance is None else importance
    mask, rendered = mask_of(weight, format_.name, importance), render(weight, format_.name, importance)
    mixture, length = mixture_of(format_), format_.group_size or 1
    assert int(mask.sum()) == int(mixture.wide_share * (in_features // length) + 0.5) * length
    for part, columns in ((mixture.wide, mask), (mixture.narrow, ~mask)):
        if columns.any():
            expected = render(weight[:, columns], FORMATS[part.name].name, h[columns])
            assert torch.equal(rendered[:, columns], expected)


@pytest.mark.parametrize("name", ["int1_top20int4_channel", "int4_top12int8_channel", "int1_top20int4_g64"])
def test_wide_columns_are_those_of_the_largest_errors(name: str) -> None:
    """Whatever is chosen, no narrow column has more weighted error at the narrow width than a wide one has."""
    weight, importance = WEIGHTS["normal"](7, 320), draw_statistics(320).hessian().diagonal()
    narrow = mixture_of(FORMATS[name]).narrow.name
    difference = render(weight, narrow, importance).double() - weight.double()
    error = (importance.double() * difference.square()).sum(0)
    mask = mask_of(weight, name, importance)
    assert error[mask].min() >= error[~mask].max() * (1 - 2.0**-20)


@pytest.mark.parametrize("name", ["int1_top20int4_channel", "int4_top12int8_g64"])
def test_channels_of_large_inputs_become_wide(name: str) -> None:
    weight, importance = WEIGHTS["normal"](64, 640), torch.ones(640)
    large = torch.arange(3, 640, 11)
    importance[large] = 1e4
    assert mask_of(weight, name, importance)[large].all()


@pytest.mark.parametrize("format_", FAMILY, ids=lambda f: f.name)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_no_more_error_than_narrow_throughout(format_: Format, weights: str) -> None:
    weight, narrow = WEIGHTS[weights](5, 640), mixture_of(format_).narrow.name
    h = torch.ones(640)
    mixed = errors_by_group(weight, render(weight, format_.name), narrow, h).sum()
    # Narrow columns close up into other groups, which may cost a little; what the wide ones win is far more.
    assert mixed <= errors_by_group(weight, render(weight, narrow, h), narrow, h).sum()


@pytest.mark.parametrize("name", ["int1_top20int4_g128", "int4_top12int8_channel"])
def test_bytes_by_hand(name: str) -> None:
    rows, columns = 3, 640
    if name == "int1_top20int4_g128":  # 5 groups, of which one is wide
        wide = rows * (64 + 2 + 1)  # codes, a scale, a zero point of 4 bits
        narrow = rows * (64 + 4 * 2)  # codes and four scales
    else:  # 80 columns
        wide = rows * (80 + 2 + 1)
        narrow = rows * (280 + 2 + 1)
    assert FORMATS[name].storage_bytes((rows, columns)) == columns // 8 + wide + narrow
    assert sum(tensor.nbytes for tensor in encode(WEIGHTS["normal"](3, 640), name).values()) == 80 + wide + narrow


@pytest.mark.parametrize(("format_", "in_features"), CASES, ids=IDS)
def test_rows_are_read_alone(format_: Format, in_features: int) -> None:
    weight, rows, shape = WEIGHTS["normal"](5, in_features), torch.tensor([4, 0, 4]), (5, in_features)
    tensors = encode(weight, format_.name)
    assert torch.equal(decode_column_mixture(tensors, format_, shape, rows), render(weight, format_.name)[rows])
    codes = column_mixture_codes(tensors, format_, shape)
    assert torch.equal(column_mixture_codes(tensors, format_, shape, rows), codes[rows])
    mask = read_column_mask(tensors, shape)
    mixture = mixture_of(format_)
    for part, columns in ((mixture.wide, mask), (mixture.narrow, ~mask)):
        assert not columns.any() or int(codes[:, columns].max()) < 1 << part.bits


def test_a_mask_is_one_bit_a_column() -> None:
    tensors = encode(WEIGHTS["normal"](5, 97), "int1_top20int4_channel")
    mask = np.unpackbits(tensors["mask"].numpy(), bitorder="little")[:97]
    assert tensors["mask"].shape == (13,) and mask.sum() == 19
    assert np.array_equal(mask, read_column_mask(tensors, (5, 97)).numpy())


def test_group_must_divide_the_row() -> None:
    with pytest.raises(ValueError, match="group_size=64, in_features=97 in format 'int4_top12int8_g64'"):
        encode_column_mixture(torch.ones(1, 97), FORMATS["int4_top12int8_g64"])


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(ValueError, match="range of format 'int1_channel_sym', at most 65504: got"):
        encode_column_mixture(torch.tensor([[7e4, 0.0]]), FORMATS["int1_top20int4_channel"])
    with pytest.raises(ValueError, match="scales must be finite in float16"):
        encode_column_mixture(torch.tensor([[3e6, 0.0]]), FORMATS["int4_top12int8_channel"])
