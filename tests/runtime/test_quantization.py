"""Reading codes back against the formula in float64."""

import numpy as np
import pytest
import torch

from runtime.formats import FORMATS
from runtime.quantization import QuantizedWeight, dequantize, dequantize_codes


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
