"""Binary planes: nearest sums, least squares, no worse than the integer grids they contain, near the global optimum."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.codecs.planes import decode_planes, encode_planes, planes_codes
from runtime.formats import FORMATS, Format
from runtime.packing import pack_codes
from tests.runtime.codecs.cases import WEIGHTS, Array, encode, errors_by_group, render
from tests.runtime.quantizers.cases import draw_statistics

FAMILY = [f for f in FORMATS.values() if f.kind == "planes"]
SHAPE = (3, 128)


def levels_of(scale: Tensor, format_: Format) -> Array:
    """Returns the sum of every code [rows, groups, 2^bits] in float64, from the stored scales."""
    numbers = scale.double().numpy()
    numbers = 2.0**numbers if format_.scale_type == "pow2" else numbers
    alphabet = (0, 1) if format_.element == "zero_one" else (-1, 1)
    # The lowest bit of a code is the first plane, and varies fastest.
    planes = np.array([signs[::-1] for signs in itertools.product(alphabet, repeat=format_.bits)])
    return numbers @ planes.T.astype(np.float64)


@pytest.mark.parametrize("format_", FAMILY, ids=lambda f: f.name)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_codes_are_the_nearest_of_all_sums(weights: str, format_: Format) -> None:
    weight = WEIGHTS[weights](*SHAPE)
    tensors = encode(weight, format_.name)
    levels = levels_of(tensors["scale"], format_)
    grouped = weight.double().numpy().reshape(*levels.shape[:2], -1)
    codes = planes_codes(tensors, format_, SHAPE).long().numpy().reshape(grouped.shape)
    rendered = render(weight, format_.name).double().numpy().reshape(grouped.shape)
    # Sums of a few numbers in float32: each addition is off by 2^-24 of the largest sum.
    slack = format_.bits * 2.0**-23 * np.abs(levels).max(-1, keepdims=True)
    assert (np.abs(rendered - np.take_along_axis(levels, codes, -1)) <= slack).all()
    least = np.abs(grouped[..., None] - levels[:, :, None]).min(-1)
    assert (np.abs(rendered - grouped) <= least + 2 * slack).all()


@pytest.mark.parametrize("weights", ["normal", "outliers", "zeros", "positive", "large"])
@pytest.mark.parametrize("name", ["bcq2_g64", "bcq3_g64", "bcq4_g64", "bcq2_g128", "bcq3_channel"])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_more_error_than_the_grid_of_even_steps(name: str, weights: str, weighted: bool) -> None:
    """Scales in ratios of two are even steps about zero: those up to the largest magnitude are one of the starts."""
    weight, format_ = WEIGHTS[weights](*SHAPE), FORMATS[name]
    importance = draw_statistics(128).hessian().diagonal() if weighted else None
    h = np.ones(128) if importance is None else importance.double().numpy()
    found = errors_by_group(weight, render(weight, name, importance), name, importance)
    grouped = weight.double().numpy().reshape(3, format_.group_count(128), -1)
    top = (1 << format_.bits) - 1
    step = 2 * np.abs(grouped).max(-1, keepdims=True) / top
    with np.errstate(invalid="ignore"):
        codes = np.nan_to_num(np.clip(np.rint(grouped / step + top / 2), 0, top))
    difference = (codes - top / 2) * step - grouped
    mass = h.reshape(grouped.shape[1:])
    even = np.sqrt((mass * difference**2).sum(-1))
    # Each scale is rounded to float16: all together by 2^-11 of the largest magnitude, or by half the smallest float16.
    rounding = (np.abs(grouped).max(-1) * 2.0**-11 + format_.bits * 2.0**-25) * np.sqrt(mass.sum(-1))
    assert (np.sqrt(found) <= even * (1 + 2.0**-14) + rounding).all()


@pytest.mark.parametrize("name", ["bcq2_channel", "bcq3_channel"])
def test_scales_are_of_least_squares(name: str) -> None:
    """With its planes given, no scales leave less than the stored ones, but for their rounding to float16."""
    weight, importance = WEIGHTS["normal"](*SHAPE), draw_statistics(128).hessian().diagonal()
    tensors, format_ = encode(weight, name, importance), FORMATS[name]
    found = errors_by_group(weight, render(weight, name, importance), name, importance)[:, 0]
    codes, root = planes_codes(tensors, format_, SHAPE).numpy(), importance.double().sqrt().numpy()
    for row in range(3):
        planes = 2.0 * (codes[row][:, None] >> np.arange(format_.bits) & 1) - 1
        numbers = weight[row].double().numpy()
        best = np.linalg.lstsq(planes * root[:, None], numbers * root, rcond=None)[0]
        least = (root**2 * (numbers - planes @ best) ** 2).sum()
        # After the last refit the codes may have moved once more: that only lowers what the fit can reach by little.
        assert least <= found[row] * (1 + 1e-9) and found[row] <= 1.01 * least


def least_error(group: Array, *, zero_one: bool) -> float:
    """Returns the least squared error of two planes over all 4^n codes, each with its best scales."""
    alphabet = (0.0, 1.0) if zero_one else (-1.0, 1.0)
    pairs = list(itertools.product(alphabet, repeat=2))
    errors = []
    for codes in itertools.product(pairs, repeat=len(group)):
        planes = np.array(codes)
        best = np.linalg.lstsq(planes, group, rcond=None)[0]
        errors.append(float(((group - planes @ best) ** 2).sum()))
    return min(errors)


@pytest.mark.parametrize("zero_one", [False, True])
def test_near_the_least_error_of_all_codes(zero_one: bool) -> None:
    """Of several starts the best local minimum: on short groups together within a tenth of the global ones."""
    format_ = Format(name="two", kind="planes", bits=2, element="zero_one" if zero_one else "")
    weight = WEIGHTS["normal"](12, 5)
    rendered = decode_planes(encode_planes(weight, format_), format_, (12, 5)).double().numpy()
    found = ((rendered - weight.double().numpy()) ** 2).sum(1)
    least = np.array([least_error(row, zero_one=zero_one) for row in weight.double().numpy()])
    rounding = (weight.abs().amax(1).double().numpy() * 2.0**-9) ** 2
    assert (found >= least - rounding).all()
    assert found.sum() <= 1.1 * least.sum()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), format_=st.sampled_from(FAMILY), rows=st.integers(1, 5))
def test_any_codes_are_read_as_their_sums(seed: int, format_: Format, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << format_.bits, (rows, 128), generator=generator, dtype=torch.uint8)
    scale = torch.randn(rows, format_.group_count(128), format_.bits, generator=generator)
    stored = (4 * scale).to(torch.int8) if format_.scale_type == "pow2" else scale.to(torch.float16)
    tensors, shape = {"codes": pack_codes(codes, format_.bits), "scale": stored}, (rows, 128)
    values = decode_planes(tensors, format_, shape)
    levels = levels_of(stored, format_)
    expected = np.take_along_axis(levels, codes.long().numpy().reshape(*levels.shape[:2], -1), -1).reshape(shape)
    assert np.allclose(values.double().numpy(), expected, rtol=0, atol=2.0**-21 * np.abs(levels).max())
    picked = torch.tensor([rows - 1, 0])
    assert torch.equal(decode_planes(tensors, format_, shape, picked), values[picked])
    assert torch.equal(planes_codes(tensors, format_, shape, picked), codes[picked])


def test_dual_binary_holds_its_own_levels() -> None:
    """The levels -s, 0, s and 2s, and their mirror image, are kept exactly; two signed planes have no such levels."""
    codes = torch.randint(0, 4, (4, 64), generator=torch.Generator().manual_seed(0))
    codes[:, :4] = torch.arange(4)
    weight = 0.25 * (codes - 1).float() * torch.tensor([1.0, -1.0, 2.0, -0.5]).unsqueeze(1)
    assert torch.allclose(render(weight, "dual_binary_g64"), weight, rtol=0, atol=2.0**-11)
    assert not torch.allclose(render(weight, "bcq2_g64"), weight, rtol=0, atol=2.0**-4)


@pytest.mark.parametrize("name", [f.name for f in FAMILY if f.scale_type == "pow2"])
def test_powers_of_two_hold_their_own_sums(name: str) -> None:
    format_ = FORMATS[name]
    exponents = -1.0 - 2 * torch.arange(format_.bits)
    signs = 2.0 * torch.randint(0, 2, (3, 128, format_.bits), generator=torch.Generator().manual_seed(0)) - 1
    weight = (signs * 2.0**exponents).sum(-1)
    assert torch.equal(render(weight, name), weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7e4], ids=str)
def test_weights_beyond_float16_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="range of format 'bcq2_channel', at most 65504: got"):
        encode_planes(torch.tensor([[1.0, value]]), FORMATS["bcq2_channel"])


def test_group_must_divide_the_row() -> None:
    with pytest.raises(ValueError, match="group_size=64, in_features=97 in format 'bcq3_g64'"):
        encode_planes(torch.ones(1, 97), FORMATS["bcq3_g64"])
