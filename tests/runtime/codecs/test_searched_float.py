"""Searched floats: the split and the scales of least error, against all splits rendered alone in float64."""

import numpy as np
import pytest
import torch

from runtime.codecs.searched_float import (
    decode_searched_float,
    encode_searched_float,
    list_splits,
    searched_float_codes,
)
from runtime.elements import make_float
from runtime.formats import FORMATS, Format
from tests.runtime.codecs.cases import WEIGHTS, encode, errors_by_group, nearest, render
from tests.runtime.quantizers.cases import draw_statistics

FAMILY = [f for f in FORMATS.values() if f.kind == "searched_float"]
SHAPE = (4, 128)


@pytest.mark.parametrize("format_", FAMILY, ids=lambda f: f.name)
@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_are_the_nearest_of_the_row_s_split(name: str, format_: Format) -> None:
    weight = WEIGHTS[name](*SHAPE)
    tensors, rendered = encode(weight, format_.name), render(weight, format_.name).double().numpy()
    for row, exponent_bits in enumerate(tensors["exponent"].tolist()):
        element = make_float(exponent_bits, format_.bits - 1 - exponent_bits, 7)
        values = np.array(element.values) / element.largest
        scale = tensors["scale"][row].double().numpy().repeat(128 // format_.group_count(128))
        numbers = weight[row].double().numpy()
        exact = nearest(numbers / scale, values) * scale
        # Values, quotient and product are rounded to float32.
        slack = 2.0**-21 * np.abs(numbers) + 2.0**-24 * scale
        assert (np.abs(rendered[row] - numbers) <= np.abs(exact - numbers) + slack).all()


@pytest.mark.parametrize("format_", FAMILY, ids=lambda f: f.name)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_split_leaves_less_than_the_chosen(format_: Format, weighted: bool) -> None:
    weight = WEIGHTS["normal"](*SHAPE)
    weight[1] = weight[1].sign() * weight[1].abs().pow(5)  # a row that wants more exponents
    importance = draw_statistics(128).hessian().diagonal() if weighted else None
    h = torch.ones(128) if importance is None else importance
    found = errors_by_group(weight, render(weight, format_.name, importance), format_.name, importance).sum(1)
    groups = format_.group_count(128)
    grouped = weight.double().numpy().reshape(4, groups, -1)
    scale = np.abs(grouped).max(-1, keepdims=True).astype(np.float16).astype(np.float64)
    for exponent_bits in list_splits(format_.bits):
        element = make_float(exponent_bits, format_.bits - 1 - exponent_bits, 0)
        fitted = nearest(grouped / scale, np.array(element.values) / element.largest) * scale
        other = (h.double().numpy() * (fitted - grouped).reshape(4, -1) ** 2).sum(1)
        assert (found <= other * (1 + 2.0**-14)).all()


def test_rows_take_splits_of_their_own() -> None:
    weight = WEIGHTS["normal"](*SHAPE)
    weight[1] = weight[1].sign() * weight[1].abs().pow(5)
    weight[2] = torch.linspace(-1, 1, 128)
    exponent = encode(weight, "fp5_channel")["exponent"]
    assert exponent[1] > exponent[0] > exponent[2] == 1


@pytest.mark.parametrize("name", ["fp4_channel", "fp8_g64"])
def test_rows_are_read_alone(name: str) -> None:
    weight, format_ = WEIGHTS["outliers"](5, 128), FORMATS[name]
    tensors, rows = encode(weight, name), torch.tensor([4, 0, 4])
    assert torch.equal(decode_searched_float(tensors, format_, (5, 128), rows), render(weight, name)[rows])
    codes = searched_float_codes(tensors, format_, (5, 128), rows)
    assert codes.shape == (3, 128) and int(codes.max()) < 1 << format_.bits


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(ValueError, match="range of format 'fp4_channel', at most 65504: got"):
        encode_searched_float(torch.tensor([[7e4, 0.0]]), FORMATS["fp4_channel"])
