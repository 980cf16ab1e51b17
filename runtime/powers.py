"""Powers of two as scales: exponents from numbers, numbers from exponents, both exact."""

import torch
from torch import Tensor

LEAST_EXPONENT, MOST_EXPONENT = -127, 127
# A table, because a library's power function may be off by one unit in the last place.
_POWERS = torch.tensor([2.0**exponent for exponent in range(LEAST_EXPONENT, MOST_EXPONENT + 1)], dtype=torch.float32)


def power_of_two(exponent: Tensor) -> Tensor:
    """Returns 2^exponent as float32, for integer exponents from -127 to 127."""
    return _POWERS.to(exponent.device)[exponent.to(torch.int64) - LEAST_EXPONENT]


def floor_exponent(values: Tensor) -> Tensor:
    """Returns floor(log2 x) of positive float32 numbers, as int32."""
    return torch.frexp(values).exponent - 1


def nearest_exponent(values: Tensor) -> Tensor:
    """Returns the exponent of the power of two nearest to each positive float32 number, as int32; the lower of two."""
    mantissa, exponent = torch.frexp(values)
    return exponent - (mantissa <= 0.75).to(torch.int32)
