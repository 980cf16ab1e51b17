"""Rounding to 16-bit types against numpy and bit patterns."""

import re

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.codecs.unquantized import decode_unquantized, encode_unquantized
from runtime.formats import FORMATS


def round_to_float(weight: Tensor, name: str) -> NDArray[np.float32]:
    """Returns the weight read back from a 16-bit format."""
    shape = (weight.shape[0], weight.shape[1])
    return decode_unquantized(encode_unquantized(weight, FORMATS[name]), FORMATS[name], shape).numpy()


def round_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns float32 numbers rounded to 16 bits, ties to even, on their bit patterns."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def test_rounding_to_16_bit_types() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-6.0, -2.0, 1 / 16)
    weight[0, :4] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, -0.0])  # ties and a signed zero
    values = weight.numpy()
    assert np.array_equal(round_to_float(weight, "bf16"), round_to_bfloat16(values))
    assert np.array_equal(round_to_float(weight, "fp16"), values.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "value"), [("fp16", 70000.0), ("fp16", float("inf")), ("bf16", float("nan")), ("bf16", 3.4e38)]
)
def test_weights_outside_the_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"range of format '{name}': got max|w|={value:g}")):
        round_to_float(torch.tensor([[0.0, value]]), name)
