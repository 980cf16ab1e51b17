"""Nested widths: each is a prefix of the next, within the bound of its own width, and reads no more than its bytes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.codecs.nested import decode_nested, encode_nested, nested_codes, read_at_width
from runtime.formats import FORMATS, Format
from runtime.storage import NESTED_WIDTHS
from tests.runtime.codecs.cases import WEIGHTS, encode, errors_by_group, render
from tests.runtime.quantizers.cases import draw_statistics

FAMILY = [f for f in FORMATS.values() if f.kind == "nested"]
SHAPE = (5, 128)


def up_to(tensors: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """Returns the tensors of a width and the lower ones."""
    return {name: tensor for name, tensor in tensors.items() if int(name.split("_")[1]) <= width}


@pytest.mark.parametrize("format_", FAMILY, ids=lambda f: f.name)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_error_of_each_width_is_within_half_a_part(format_: Format, weights: str, weighted: bool) -> None:
    weight = WEIGHTS[weights](*SHAPE)
    importance = draw_statistics(128).hessian().diagonal() if weighted else None
    h = torch.ones(128) if importance is None else importance
    tensors = encode(weight, format_.name, importance)
    groups = format_.group_count(128)
    largest = weight.double().abs().reshape(5, groups, -1).amax(-1).numpy()
    mass = h.double().view(groups, -1).sum(-1).numpy()
    for width in NESTED_WIDTHS:
        found = errors_by_group(weight, read_at_width(tensors, format_, SHAPE, width), format_.name, importance)
        # Half a part is R / 2^b, and the fitted scale is never worse than R / 2^(b-1). It is rounded to float16: by a
        # relative 2^-11 of values up to R, or by half of the smallest float16 times 2^(b-1).
        rounding = largest * 2.0**-11 + 2.0**-25 * (1 << (width - 1))
        bound = (largest / (1 << width) * (1 + 2.0**-20) + rounding) * np.sqrt(mass)
        assert (np.sqrt(found) <= bound).all()


@pytest.mark.parametrize("weights", ["normal", "outliers", "columns"])
def test_lower_codes_are_the_weight_rounded_at_that_width(weights: str) -> None:
    """Rounding once at 4 or 6 bits, in float64, gives the prefix of the codes of 8 bits."""
    weight = WEIGHTS[weights](*SHAPE)
    tensors, format_ = encode(weight, "nested8_channel"), FORMATS["nested8_channel"]
    codes = nested_codes(tensors, format_, SHAPE).numpy()
    numbers = weight.double().numpy()
    largest = np.abs(numbers).max(1, keepdims=True)
    for width in NESTED_WIDTHS:
        half = 1 << (width - 1)
        parts = numbers / largest * half
        # Within a relative 2^-20 of a boundary the float32 quotient may fall on its other side.
        clear = np.abs(parts - np.rint(parts)) > half * 2.0**-20
        expected = np.clip(np.floor(parts) + half, 0, 2 * half - 1)
        assert clear.mean() > 0.9
        assert np.array_equal((codes >> (8 - width))[clear], expected[clear])


@pytest.mark.parametrize("format_", FAMILY, ids=lambda f: f.name)
def test_a_width_reads_its_own_bytes_alone(format_: Format) -> None:
    weight = WEIGHTS["normal"](*SHAPE)
    tensors = encode(weight, format_.name)
    groups = format_.group_count(128)
    assert torch.equal(read_at_width(tensors, format_, SHAPE, 8), decode_nested(tensors, format_, SHAPE))
    errors = []
    for width in NESTED_WIDTHS:
        prefix = up_to(tensors, width)
        scales = NESTED_WIDTHS.index(width) + 1
        assert sum(tensor.nbytes for tensor in prefix.values()) == 5 * (128 * width // 8 + 2 * scales * groups)
        values = read_at_width(prefix, format_, SHAPE, width)
        rows = torch.tensor([4, 0, 4])
        assert torch.equal(read_at_width(prefix, format_, SHAPE, width, rows), values[rows])
        errors.append((values - weight).square().mean().sqrt().item())
    # Two bits more are four times as many values: the error of even parts falls fourfold.
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2) and errors[1] / errors[2] == pytest.approx(4, rel=0.2)
    four_bits = FORMATS[f"int4_{format_.name.split('_')[1]}_sym"].storage_bytes(SHAPE)
    assert sum(tensor.nbytes for tensor in up_to(tensors, 4).values()) == four_bits


def test_scale_of_a_width_is_of_least_error() -> None:
    weight, importance = WEIGHTS["outliers"](*SHAPE), draw_statistics(128).hessian().diagonal()
    tensors = encode(weight, "nested8_channel", importance)
    for width in NESTED_WIDTHS:
        values = read_at_width(tensors, FORMATS["nested8_channel"], SHAPE, width).double()
        h, numbers = importance.double(), weight.double()
        best = (h * numbers * values).sum(1) / (h * values.square()).sum(1)
        # The best factor on top of the stored scale is one, but for rounding it to float16.
        assert ((best - 1).abs() <= 2.0**-10).all()


@pytest.mark.parametrize("in_features", [1, 7, 97])
def test_rows_of_any_length(in_features: int) -> None:
    weight = WEIGHTS["normal"](3, in_features)
    # Half a part of 256, and the rounding of the scale and its fit.
    error = (render(weight, "nested8_channel") - weight).square().mean(1).sqrt()
    assert (error <= weight.abs().amax(1) * (2.0**-8 + 2.0**-11)).all()


def test_other_widths_are_refused() -> None:
    tensors = encode(WEIGHTS["normal"](*SHAPE), "nested8_g64")
    with pytest.raises(ValueError, match="one of 4, 6, 8 bits: got width=5. Read the next higher one"):
        read_at_width(tensors, FORMATS["nested8_g64"], SHAPE, 5)


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(ValueError, match="range of format 'nested8_channel', at most 65504: got"):
        encode_nested(torch.tensor([[7e4, 0.0]]), FORMATS["nested8_channel"])
    with pytest.raises(ValueError, match="group_size=64, in_features=97 in format 'nested8_g64'"):
        encode_nested(torch.ones(1, 97), FORMATS["nested8_g64"])
