"""Products of weights as levels with steps and shifts in float32, of every instruction set at hand, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.kernels.build import find_compiler
from runtime.kernels.cpu import CpuKernels, Product
from runtime.kernels.matrices import Levels, describe_levels
from runtime.packing import pack_codes
from tests.runtime.kernels.stored_weights import Case, available_kernels, bound_error, draw_activations

KERNELS = available_kernels()
pytestmark = pytest.mark.skipif(not KERNELS and find_compiler() is None, reason="no C++ compiler is here")


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
@settings(max_examples=80, deadline=None)
@given(
    bits=st.integers(1, 8),
    group_size=st.sampled_from([16, 32, 48, 64, 128, 256, None]),
    rows=st.integers(1, 70),
    groups=st.integers(1, 19),
    columns=st.integers(1, 700),
    tokens=st.integers(1, 12),
)
def test_products_of_any_shape(
    kernels: CpuKernels, bits: int, group_size: int | None, rows: int, groups: int, columns: int, tokens: int
) -> None:
    columns = columns if group_size is None else groups * group_size
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    count = columns // (group_size or columns)
    step = (torch.rand(rows, count, generator=generator) + 0.1) * torch.tensor([1.0, -1.0]).repeat(count)[:count]
    shift = step * torch.rand(rows, count, generator=generator) * (1 << bits)
    matrix = describe_levels(Levels(pack_codes(codes, bits), step, shift, bits, columns))
    grouped = codes.double().view(rows, count, -1)
    dense = (grouped * step.double().unsqueeze(-1) - shift.double().unsqueeze(-1)).view(rows, columns)
    x = draw_activations(tokens, columns)
    (y,) = kernels.multiply([Product(x, matrix)])
    # Steps are at most 1.1, and what a code and its shift contribute at most that times 2^bits each.
    case = Case(bits=bits, group_size=group_size, symmetric=False, rows=rows, columns=columns)
    assert ((y.double() - x.double() @ dense.T).abs() <= bound_error(case, dense, x)).all()
    read = kernels.dequantize(matrix).double()
    assert ((read - dense).abs() <= 2.0**-23 * 1.1 * 2.0 ** (bits + 1)).all()
