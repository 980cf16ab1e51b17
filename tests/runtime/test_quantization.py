"""Reading codes back against the formula in float64, and rounding to 16-bit types against numpy."""

import re

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from runtime.formats import FORMATS
from runtime.quantization import QuantizedWeight, dequantize, dequantize_codes, round_to_float


def round_to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns float32 numbers rounded to 16 bits, ties to even, on their bit patterns."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_times_scales(bits: int, groups: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (5, 6 * groups), dtype=torch.uint8, generator=generator)
    scale = torch.rand(5, groups, generator=generator).add(2.0**-20).to(torch.float16)
    zero_point = torch.randint(0, 1 << bits, (5, groups), dtype=torch.uint8, generator=generator)
    zeros = np.full((5, groups), 1 << (bits - 1)) if symmetric else zero_point.numpy().astype(np.int64)
    expected = scale.numpy().astype(np.float64).repeat(6, 1) * (codes.numpy().astype(np.int64) - zeros.repeat(6, 1))
    values = dequantize_codes(codes, scale, None if symmetric else zero_point, bits)
    # A scale has 11 significant bits and a difference of codes at most 9: float32 holds their product exactly.
    assert values.dtype == torch.float32
    assert np.array_equal(values.numpy().astype(np.float64), expected)


def test_codes_in_columns_are_read_as_codes_in_rows() -> None:
    format_ = FORMATS["int4_g32"]
    codes = torch.arange(64 * 6).remainder(16).to(torch.uint8).view(64, 6).T
    quantized = QuantizedWeight(
        format=format_, codes=codes, scale=torch.full((6, 2), 0.5).half(), zero_point=torch.zeros(6, 2).byte()
    )
    assert torch.equal(dequantize(quantized), codes.float() * 0.5)


def test_rounding_to_16_bit_types() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-6.0, -2.0, 1 / 16)
    weight[0, :4] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, -0.0])  # ties and a signed zero
    values = weight.numpy()
    assert np.array_equal(round_to_float(weight, FORMATS["bf16"]).numpy(), round_to_bfloat16(values))
    assert np.array_equal(round_to_float(weight, FORMATS["fp16"]).numpy(), values.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "value"), [("fp16", 70000.0), ("fp16", float("inf")), ("bf16", float("nan")), ("bf16", 3.4e38)]
)
def test_weights_outside_the_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"range of format '{name}': got max|w|={value:g}")):
        round_to_float(torch.tensor([[0.0, value]]), FORMATS[name])
