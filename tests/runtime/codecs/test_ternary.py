"""Three values a group: the least error of any, by exhaustive search; the median's rule; five digits a byte."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.codecs.ternary import decode_ternary, encode_ternary, ternary_codes
from runtime.formats import FORMATS
from runtime.packing import pack_trits
from tests.runtime.codecs.cases import WEIGHTS, Array, encode, render
from tests.runtime.quantizers.cases import draw_statistics

FAMILY = [f for f in FORMATS.values() if f.kind == "ternary"]


def least_error(group: Array, h: Array) -> float:
    """Returns the least weighted squared error over all 3^n codes, each with its best scale."""
    errors = []
    for digits in itertools.product((-1.0, 0.0, 1.0), repeat=len(group)):
        t = np.array(digits)
        mass = (h * t * t).sum()
        scale = max((h * t * group).sum() / mass, 0.0) if mass else 0.0
        errors.append(float((h * (group - scale * t) ** 2).sum()))
    return min(errors)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 7), weighted=st.booleans())
def test_error_is_the_least(seed: int, length: int, weighted: bool) -> None:
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.standard_normal((2, length))).float()
    h = rng.uniform(0.1, 10.0, length) if weighted else np.ones(length)
    importance = torch.from_numpy(h).float() if weighted else None
    rendered = render(weight, "ternary_channel", importance).double().numpy()
    for values, row in zip(rendered, weight.double().numpy(), strict=True):
        # Rounding a scale s to float16 moves each value by up to s 2^-11, and s is at most the largest magnitude.
        largest = np.abs(row).max() * 2.0**-11
        bound = (np.sqrt(least_error(row, h)) + largest * np.sqrt(h.sum())) ** 2
        assert (h * (row - values) ** 2).sum() <= bound * (1 + 1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", [f.name for f in FAMILY])
@pytest.mark.parametrize("rows", [1, 7])
def test_values_are_the_nearest_of_three(name: str, weights: str, rows: int) -> None:
    weight, format_ = WEIGHTS[weights](rows, 256), FORMATS[name]
    tensors, rendered = encode(weight, name), render(weight, name)
    scale = tensors["scale"].double().repeat_interleave(256 // tensors["scale"].shape[1], dim=1)
    error = (rendered.double() - weight.double()).abs()
    least = torch.stack([(weight.double() - t * scale).abs() for t in (-1, 0, 1)]).amin(0)
    assert torch.equal(error, least)
    # A weight within the scale is off by half of it at most, one beyond by what it is beyond.
    assert (error <= torch.maximum(scale / 2, weight.double().abs() - scale)).all()
    assert set(ternary_codes(tensors, format_, (rows, 256)).unique().tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("in_features", [1, 4, 5, 97, 256])
def test_median_is_the_rule_of_bitnet(in_features: int) -> None:
    weight = WEIGHTS["normal"](3, in_features)
    median = np.median(weight.abs().numpy(), axis=1, keepdims=True).astype(np.float16).astype(np.float64)
    expected = median * np.clip(np.rint(weight.double().numpy() / median), -1, 1)
    assert np.array_equal(render(weight, "ternary_channel_median").double().numpy(), expected)


@pytest.mark.parametrize("name", [f.name for f in FAMILY])
def test_ternary_weights_come_back_exactly(name: str) -> None:
    digits = torch.randint(-1, 2, (5, 128), generator=torch.Generator().manual_seed(0)).float()
    digits[:, ::3] = 1.0  # more than half of each group is not zero, so that the median is the scale
    weight = 0.0625 * digits
    assert torch.equal(render(weight, name), weight)


@pytest.mark.parametrize("weights", ["normal", "outliers", "positive"])
def test_searched_scale_beats_the_median(weights: str) -> None:
    weight = WEIGHTS[weights](5, 97)
    searched, median = (
        (render(weight, name) - weight).double().square().sum(1)
        for name in ("ternary_channel", "ternary_channel_median")
    )
    assert (searched <= median).all() and searched.sum() < median.sum()


def test_a_byte_is_five_digits() -> None:
    format_, packed = FORMATS["ternary_channel"], encode(WEIGHTS["normal"](3, 97), "ternary_channel")["codes"]
    codes = ternary_codes({"codes": packed}, format_, (3, 97))
    assert packed.shape == (3, 20) and int(packed.max()) <= 242
    digits = np.pad(codes.numpy().astype(np.int64), ((0, 0), (0, 3))).reshape(3, 20, 5)
    assert np.array_equal(packed.numpy(), (digits * 3 ** np.arange(5)).sum(-1))
    assert torch.equal(pack_trits(codes), packed)


def test_rows_are_read_alone() -> None:
    weight, format_ = WEIGHTS["outliers"](5, 128), FORMATS["ternary_g64"]
    tensors, rows = encode(weight, "ternary_g64", draw_statistics(128).hessian().diagonal()), torch.tensor([4, 0, 4])
    whole = decode_ternary(tensors, format_, (5, 128))
    assert torch.equal(decode_ternary(tensors, format_, (5, 128), rows), whole[rows])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7e4], ids=str)
def test_weights_beyond_float16_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="range of format 'ternary_channel', at most 65504: got"):
        encode_ternary(torch.tensor([[1.0, value]]), FORMATS["ternary_channel"])


def test_group_must_divide_the_row() -> None:
    with pytest.raises(ValueError, match="group_size=64, in_features=97 in format 'ternary_g64'"):
        encode_ternary(torch.ones(1, 97), FORMATS["ternary_g64"])
