"""Element types against torch's own 8-bit floats, and against the values that the OCP specifications print."""

import math

import pytest
import torch

from runtime.elements import ELEMENTS, make_float


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_8_bit_floats_are_those_of_torch(name: str) -> None:
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    expected = torch.arange(256).to(torch.uint8).view(dtype).to(torch.float32)
    values = torch.tensor(ELEMENTS[name].values, dtype=torch.float32)
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values.nan_to_num(), expected.nan_to_num())
    assert ELEMENTS[name].largest == torch.finfo(dtype).max


def test_4_bit_float() -> None:
    half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert list(ELEMENTS["e2m1"].values) == half + [-value for value in half]


@pytest.mark.parametrize(
    ("name", "largest", "least_normal", "least", "steps"),
    # MX v1.0, table 5: largest normal, smallest normal, smallest subnormal number.
    [("e2m3", 7.5, 1.0, 0.125, 32), ("e3m2", 28.0, 0.25, 0.0625, 32), ("e2m1", 6.0, 1.0, 0.5, 8)],
)
def test_finite_floats(name: str, largest: float, least_normal: float, least: float, steps: int) -> None:
    element = ELEMENTS[name]
    positive = sorted(value for value in element.values if value > 0)
    assert (element.largest, positive[0]) == (largest, least)
    # Below the smallest normal number all steps are alike; from there on they double with each power of two.
    assert all(math.isclose(value % least, 0.0) for value in positive if value <= least_normal)
    assert len(positive) == steps - 1 and len(element.values) == 2 * steps
    assert [-value for value in element.values[:steps]] == list(element.values[steps:])


def test_integers() -> None:
    assert [round(value * 64) for value in ELEMENTS["int8"].values] == [*range(128), *range(-128, 0)]
    assert list(ELEMENTS["int4"].values) == [*range(8), *range(-8, 0)]


@pytest.mark.parametrize("exponent_bits", range(1, 6))
@pytest.mark.parametrize("mantissa_bits", range(4))
def test_largest_value_is_that_of_the_formula(exponent_bits: int, mantissa_bits: int) -> None:
    """LLM-FP4: maxval(b) = (2 - 2^-M) 2^(2^E - 1 - b), and the bias of a maximum gives that maximum."""
    for bias in range(-3, 20):
        largest = make_float(exponent_bits, mantissa_bits, bias).largest
        assert largest == (2 - 2.0**-mantissa_bits) * 2.0 ** (2**exponent_bits - 1 - bias)
        found = 2**exponent_bits - math.log2(largest) + math.log2(2 - 2.0**-mantissa_bits) - 1
        assert found == pytest.approx(bias, abs=1e-12)
