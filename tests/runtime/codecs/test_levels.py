"""Levels and steps give back what the codecs read, bit for bit, and there are levels where there can be."""

import pytest
import torch

from runtime.codecs import CODECS
from runtime.codecs.levels import find_span, read_levels
from runtime.formats import FORMATS

ROWS, COLUMNS = 7, 768
KINDS = ("int", "element", "ternary", "chosen_type", "ggml", "group_mixture")
WITH_LEVELS = [name for name, f in FORMATS.items() if f.kind in KINDS and find_span(f) and f.fits(COLUMNS)]


@pytest.mark.parametrize("name", WITH_LEVELS)
def test_levels_times_steps_are_the_values_of_the_codec(name: str) -> None:
    format_ = FORMATS[name]
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(len(name))) * 0.02
    # A group of zeros, and one value far from all others.
    weight[3, :256] = 0.0
    weight[5, 100] = 0.7
    tensors = CODECS[format_.kind].encode(weight, format_)
    expected = CODECS[format_.kind].decode(tensors, format_, (ROWS, COLUMNS))
    found = read_levels(tensors, format_, (ROWS, COLUMNS))
    span = find_span(format_)
    assert span is not None
    assert span[0] <= int(found.levels.min()) <= int(found.levels.max()) <= span[1] < span[0] + 256
    grouped = found.levels.to(torch.float32).view(*found.step.shape, -1)
    values = grouped * found.step.unsqueeze(-1)
    if found.least is not None:
        values = values - found.least.unsqueeze(-1)
    if format_.kind in ("int", "group_mixture"):
        # The codec subtracts before it multiplies: other roundings of the same numbers.
        largest = found.step.unsqueeze(-1) * (span[1] + 1)
        assert ((values.view_as(grouped) - expected.view_as(grouped)).abs() <= 2.0**-22 * largest).all()
    else:
        assert torch.equal(values.flatten(1), expected)


@pytest.mark.parametrize(
    "name",
    [
        "mxfp8_e4m3",
        "mxfp8_e5m2",
        "mxfp6_e3m2",
        "fp4_g64",
        "bcq2_g64",
        "bf16",
        "int1_g64",
        "int2_mix25int4_g64_outliers",
    ],
)
def test_formats_of_wide_spans_or_without_a_step_have_none(name: str) -> None:
    assert find_span(FORMATS[name]) is None


@pytest.mark.parametrize(
    ("name", "span"),
    [
        ("mxfp4", (-12, 12)),
        ("mxint8", (-128, 127)),
        ("bitmod4_g64", (-16, 16)),
        ("q4_k", (0, 15)),
        ("iq4_nl", (-127, 113)),
        ("int2_mix25int4_g64", (0, 15)),
    ],
)
def test_spans(name: str, span: tuple[int, int]) -> None:
    assert find_span(FORMATS[name]) == span
