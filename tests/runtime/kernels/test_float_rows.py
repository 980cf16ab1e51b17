"""Products of weights in 16-bit floating point, of every instruction set at hand, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.kernels.build import find_compiler
from runtime.kernels.cpu import CpuKernels, Product
from runtime.kernels.matrices import describe_floats
from tests.runtime.kernels.stored_weights import FLOAT_EPS, available_kernels

KERNELS = available_kernels()
pytestmark = pytest.mark.skipif(not KERNELS and find_compiler() is None, reason="no C++ compiler is here")


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    rows=st.integers(1, 40),
    columns=st.integers(1, 700),
    tokens=st.integers(1, 40),
    biased=st.booleans(),
)
def test_products_of_any_shape(
    kernels: CpuKernels, dtype: torch.dtype, rows: int, columns: int, tokens: int, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    x = torch.randn(tokens, columns, generator=generator)
    bias = torch.linspace(-3, 3, rows) if biased else None
    (y,) = kernels.multiply([Product(x, describe_floats(weight), bias)])
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    # Weights are exact in float32. No sum is of more than an eighth of the columns; its lanes and parts come after it.
    magnitude = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    assert ((y.double() - expected).abs() <= (columns / 8 + 16) * FLOAT_EPS * magnitude).all()


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_is_read_as_it_is(kernels: CpuKernels, dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[torch.isfinite(numbers)].reshape(-1, 1).contiguous()
    for tokens in (1, 5):
        (y,) = kernels.multiply([Product(torch.ones(tokens, 1), describe_floats(numbers))])
        assert torch.equal(y, numbers.to(torch.float32).T.expand(tokens, -1))


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
def test_what_is_not_finite_stays_with_its_token(kernels: CpuKernels) -> None:
    weight = torch.ones(9, 70, dtype=torch.bfloat16)
    for tokens in (2, 6):
        x = torch.ones(tokens, 70)
        x[1, 69] = float("nan")
        (y,) = kernels.multiply([Product(x, describe_floats(weight))])
        assert y[1].isnan().all()
        assert torch.equal(y[0], torch.full((9,), 70.0))


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
def test_threads_share_the_rows(kernels: CpuKernels) -> None:
    weights = [torch.randn(rows, 600).to(torch.bfloat16) for rows in (7, 301)]
    products = [Product(torch.randn(tokens, 600), describe_floats(w)) for w in weights for tokens in (1, 9)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = kernels.multiply(products)
        torch.set_num_threads(3)
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(alone, kernels.multiply(products), strict=True))
    finally:
        torch.set_num_threads(threads)
