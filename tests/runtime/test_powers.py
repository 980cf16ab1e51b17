"""Exponents and powers of two against the standard library."""

import math

import torch

from runtime.powers import floor_exponent, nearest_exponent, power_of_two


def test_powers_are_exact() -> None:
    exponents = torch.arange(-127, 128)
    assert [float(p) for p in power_of_two(exponents)] == [math.ldexp(1.0, e) for e in range(-127, 128)]
    assert torch.equal(floor_exponent(power_of_two(exponents)), exponents.to(torch.int32))


def test_exponents() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).mul(9).exp2()
    for value, floor, nearest in zip(values, floor_exponent(values), nearest_exponent(values), strict=True):
        assert 2.0 ** int(floor) <= float(value) < 2.0 ** (int(floor) + 1)
        assert int(nearest) == min((int(floor), int(floor) + 1), key=lambda e: abs(2.0**e - float(value)))
