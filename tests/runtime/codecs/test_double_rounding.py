"""Two widths: the prefix is an ordinary integer weight, and both are within the bounds of their rounding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from runtime.codecs.double_rounding import (
    decode_double_rounding,
    double_rounding_codes,
    encode_double_rounding,
    read_double_rounding,
)
from runtime.codecs.integer import decode_integer
from runtime.formats import FORMATS, Format
from tests.runtime.codecs.cases import WEIGHTS, encode, render

FAMILY = [f for f in FORMATS.values() if f.kind == "double_rounding"]
SHAPE = (5, 128)


def bound_scale(weight: Tensor, format_: Format) -> Tensor:
    """Returns the largest magnitude [rows, groups] that a scale may have: the range, rounded up to a float16."""
    magnitude = weight.double().abs().reshape(len(weight), format_.group_count(weight.shape[1]), -1).amax(-1)
    steps = 2 ** (format_.bits - 1) - 2 ** (format_.rest_bits - 1) - 0.5
    # At worst both ends are as far out, and the nearer end of the codes must reach one of them.
    return magnitude * 2**format_.rest_bits / steps * (1 + 2.0**-10) + 2.0**-24


@pytest.mark.parametrize("format_", FAMILY, ids=lambda f: f.name)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_errors_of_both_widths(format_: Format, weights: str) -> None:
    weight = WEIGHTS[weights](*SHAPE)
    tensors = encode(weight, format_.name)
    scale = tensors["scale"].double()
    assert (scale.abs() <= bound_scale(weight, format_)).all()
    steps = scale.abs().repeat_interleave(128 // scale.shape[1], dim=1)
    low, full = (read_double_rounding(tensors, format_, SHAPE, width).double() for width in format_.widths)
    fine = steps * 2.0**-format_.rest_bits
    # Products in float32 are exact to 2^-24 of a value, which is at most 8.5 scales.
    slack = steps * 2.0**-20
    assert ((full - weight).abs() <= fine / 2 + slack).all()
    assert ((low - weight).abs() <= steps / 2 + fine / 2 + slack).all()


@pytest.mark.parametrize("format_", FAMILY, ids=lambda f: f.name)
def test_prefix_is_an_integer_weight_of_the_same_bytes(format_: Format) -> None:
    weight = WEIGHTS["outliers"](*SHAPE)
    tensors = encode(weight, format_.name)
    group = format_.name.rpartition("_")[2]
    integer = FORMATS[f"int4_{group}_sym"]
    prefix = {name: tensors[name] for name in ("codes", "scale")}
    assert sum(tensor.nbytes for tensor in prefix.values()) == integer.storage_bytes(SHAPE)
    # Read by the codec of integers; no rest is there to be looked at.
    expected = decode_integer(prefix, integer, SHAPE)
    assert torch.equal(read_double_rounding(prefix, format_, SHAPE, 4), expected)
    rest = tensors["codes_rest"].nbytes
    assert format_.storage_bytes(SHAPE) == integer.storage_bytes(SHAPE) + rest
    assert rest == 5 * 128 * format_.rest_bits // 8


@pytest.mark.parametrize("format_", FAMILY, ids=lambda f: f.name)
def test_codes_are_the_weight_rounded_at_full_width(format_: Format) -> None:
    weight = WEIGHTS["normal"](*SHAPE)
    tensors = encode(weight, format_.name)
    codes = double_rounding_codes(tensors, format_, SHAPE).numpy().astype(np.int64) + {6: -34, 8: -136}[format_.bits]
    step = tensors["scale"].double().repeat_interleave(128 // tensors["scale"].shape[1], dim=1) / 2**format_.rest_bits
    numbers = (weight.double() / step).numpy()
    # Within a relative 2^-20 of a boundary the float32 quotient may fall on its other side.
    clear = np.abs(numbers - np.floor(numbers) - 0.5) > 2.0**-12
    assert clear.mean() > 0.9
    assert np.array_equal(codes[clear], np.rint(numbers)[clear])
    # The prefix is the code rounded once more, a half upwards.
    low = read_double_rounding(tensors, format_, SHAPE, 4).double() / (step * 2**format_.rest_bits)
    assert np.array_equal(np.rint(low.numpy()), np.floor(codes / 2**format_.rest_bits + 0.5))


def test_scale_turns_to_the_side_that_reaches_further() -> None:
    # Codes reach 136.5 steps to one side and 119.5 to the other; scales are 16 steps.
    for sign in (1.0, -1.0):
        scale = encode(torch.tensor([[sign, -0.5 * sign]]), "nested4_8_channel")["scale"].item()
        assert scale == pytest.approx(-sign * 16 / 136.5, rel=2.0**-10)
        scale = encode(torch.tensor([[sign, -sign]]), "nested4_8_channel")["scale"].item()
        assert abs(scale) == pytest.approx(16 / 119.5, rel=2.0**-10)


@pytest.mark.parametrize(
    ("name", "steps"), [("nested4_8_channel", (119.5, 136.5)), ("nested4_6_channel", (29.5, 34.5))]
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ends_of_the_range_that_are_ties_do_not_run_over(name: str, steps: tuple[float, float], sign: float) -> None:
    # The scale is exact, so both ends lie in the middle between the last code and one that is not there.
    weight = sign * torch.tensor([[steps[0], -steps[1], 3.0]]) / 64
    tensors, shape = encode(weight, name), (1, 3)
    assert tensors["scale"].item() == sign * 2.0 ** FORMATS[name].rest_bits / 64
    error = (decode_double_rounding(tensors, FORMATS[name], shape) - weight) * 64
    assert error.abs().tolist() == [[0.5, 0.5, 0.0]]


@given(
    values=st.lists(st.floats(-6e4, 6e4, width=32), min_size=1, max_size=67),
    name=st.sampled_from(["nested4_6_channel", "nested4_8_channel"]),
)
def test_rows_of_any_length_and_range(values: list[float], name: str) -> None:
    weight, format_ = torch.tensor([values]), FORMATS[name]
    shape = (1, len(values))
    tensors = encode(weight, name)
    step = abs(tensors["scale"].item()) * 2.0**-format_.rest_bits
    full = decode_double_rounding(tensors, format_, shape)
    assert ((full - weight).abs() <= step * (0.5 + 2.0**-14)).all()
    assert torch.equal(full, render(weight, name))


def test_rows_by_index() -> None:
    weight, format_ = WEIGHTS["normal"](*SHAPE), FORMATS["nested4_8_g32"]
    tensors, rows = encode(weight, format_.name), torch.tensor([4, 0, 4])
    for width in format_.widths:
        whole = read_double_rounding(tensors, format_, SHAPE, width)
        assert torch.equal(read_double_rounding(tensors, format_, SHAPE, width, rows), whole[rows])


def test_other_widths_and_weights_beyond_float16_are_refused() -> None:
    format_ = FORMATS["nested4_8_channel"]
    tensors = encode(WEIGHTS["normal"](*SHAPE), format_.name)
    with pytest.raises(ValueError, match="'nested4_8_channel' must be read at one of 4, 8 bits: got width=6"):
        read_double_rounding(tensors, format_, SHAPE, 6)
    with pytest.raises(ValueError, match="range of format 'nested4_8_channel', at most 65504: got"):
        encode_double_rounding(torch.tensor([[7e4, 0.0]]), format_)
    with pytest.raises(ValueError, match="group_size=64, in_features=97 in format 'nested4_8_g64'"):
        encode_double_rounding(torch.ones(1, 97), FORMATS["nested4_8_g64"])
