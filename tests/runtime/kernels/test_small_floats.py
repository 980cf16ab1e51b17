"""Products of weights in floats of 8 or 16 bits with scales, of every instruction set at hand, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.elements import ELEMENTS
from runtime.kernels.build import find_compiler
from runtime.kernels.cpu import CpuKernels, Product
from runtime.kernels.matrices import StoredMatrix, describe_matrix
from runtime.powers import power_of_two
from tests.runtime.kernels.stored_weights import FLOAT_EPS, available_kernels, draw_activations

KERNELS = available_kernels()
HALF = "scaled_float16"
ELEMENT_NAMES = ["e4m3", "e5m2", HALF]
pytestmark = pytest.mark.skipif(not KERNELS and find_compiler() is None, reason="no C++ compiler is here")


def values_of(element: str) -> Tensor:
    """Returns the value of each code in float32; codes that stand for no finite number are NaN or infinite."""
    if element == HALF:
        return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).to(torch.float32)
    return torch.tensor(ELEMENTS[element].values)


def as_bytes(codes: Tensor, element: str) -> Tensor:
    """Returns codes [rows, columns] of any integer type as they are stored."""
    if element != HALF:
        return codes.to(torch.uint8)
    return codes.to(torch.int16).flatten().view(torch.uint8).view(len(codes), -1)


def draw_weight(
    element: str, scale_type: str, rows: int, columns: int, groups: int, seed: int = 0
) -> tuple[StoredMatrix, Tensor]:
    """Returns a weight of random finite codes and scales, and its values in float64."""
    generator = torch.Generator().manual_seed(seed)
    finite = torch.isfinite(values_of(element)).nonzero()[:, 0]
    codes = finite[torch.randint(0, len(finite), (rows, columns), generator=generator)]
    if scale_type == "e8m0":
        scale = torch.randint(100, 140, (rows, groups), generator=generator, dtype=torch.uint8)
        factor = power_of_two(scale.to(torch.int32) - 127)
    else:
        scale = (torch.rand(rows, groups, generator=generator) + 0.1).to(getattr(torch, scale_type))
        factor = scale.to(torch.float32)
    dense = values_of(element)[codes].double().view(rows, groups, -1) * factor.double().unsqueeze(-1)
    bits = 16 if element == HALF else 8
    return StoredMatrix(as_bytes(codes, element), scale, None, bits, columns, element=element), dense.flatten(1)


def bound_error(dense: Tensor, x: Tensor) -> Tensor:
    """Returns a bound on float32 sums: one multiplication by a scale and no sum longer than an eighth of the row."""
    return (dense.shape[1] / 8 + 24) * FLOAT_EPS * (x.double().abs() @ dense.abs().T)


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
@settings(max_examples=80, deadline=None)
@given(
    element=st.sampled_from(ELEMENT_NAMES),
    scale_type=st.sampled_from(["float16", "e8m0", "float32"]),
    group_size=st.sampled_from([16, 32, 48, 64, 128, 256, None]),
    rows=st.integers(1, 40),
    groups=st.integers(1, 9),
    columns=st.integers(1, 700),
    tokens=st.integers(1, 12),
    biased=st.booleans(),
)
def test_products_of_any_shape(
    kernels: CpuKernels,
    element: str,
    scale_type: str,
    group_size: int | None,
    rows: int,
    groups: int,
    columns: int,
    tokens: int,
    biased: bool,
) -> None:
    columns, groups = (columns, 1) if group_size is None else (groups * group_size, groups)
    stored, dense = draw_weight(element, scale_type, rows, columns, groups, rows)
    x = draw_activations(tokens, columns)
    bias = torch.linspace(-3, 3, rows) if biased else None
    (y,) = kernels.multiply([Product(x, describe_matrix(stored), bias)])
    expected = x.double() @ dense.T + (0 if bias is None else bias.double())
    slack = 0 if bias is None else 2.0**-22 * (bias.double().abs() + expected.abs())
    assert ((y.double() - expected).abs() <= bound_error(dense, x) + slack).all()


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
@pytest.mark.parametrize("element", ELEMENT_NAMES)
def test_every_finite_code_is_read_as_it_is(kernels: CpuKernels, element: str) -> None:
    values = values_of(element)
    codes = torch.isfinite(values).nonzero()
    scale, stored = torch.ones(len(codes), 1, dtype=torch.float16), as_bytes(codes, element)
    matrix = describe_matrix(StoredMatrix(stored, scale, None, 8 * stored.shape[1], 1, element=element))
    expected = values[codes].T
    assert torch.equal(kernels.dequantize(matrix), expected.T)
    for tokens in (1, 4, 7):
        (y,) = kernels.multiply([Product(torch.ones(tokens, 1), matrix)])
        assert torch.equal(y, expected.expand(tokens, -1))


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
@pytest.mark.parametrize("exponent", [0, 1, 126, 127, 254])
def test_scales_that_are_powers_of_two(kernels: CpuKernels, exponent: int) -> None:
    codes = torch.full((3, 32), 0x38, dtype=torch.uint8)
    scale = torch.full((3, 1), exponent, dtype=torch.uint8)
    matrix = describe_matrix(StoredMatrix(codes, scale, None, 8, 32, element="e4m3"))
    assert torch.equal(kernels.dequantize(matrix), torch.full((3, 32), 2.0 ** (exponent - 127)))


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
@pytest.mark.parametrize("factor", [0.0, 1e-25, 1e-9, 1e9, 1e30])
def test_activations_of_any_magnitude_meet_weights_of_any(kernels: CpuKernels, factor: float) -> None:
    # Rows of the largest and of the smallest codes.
    for element, largest, least in (("e4m3", 0x7E, 0x81), ("e5m2", 0x7B, 0x81), (HALF, 0x7BFF, 0x8001)):
        codes = torch.tensor([[largest], [1], [least]]).expand(3, 192).contiguous()
        bits = 16 if element == HALF else 8
        scale = torch.ones(3, 3, dtype=torch.float16)
        stored = StoredMatrix(as_bytes(codes, element), scale, None, bits, 192, element=element)
        dense = values_of(element)[codes].double()
        for tokens in (1, 5):
            x = draw_activations(tokens, 192) * factor
            (y,) = kernels.multiply([Product(x, describe_matrix(stored))])
            assert ((y.double() - x.double() @ dense.T).abs() <= bound_error(dense, x)).all()


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_stays_with_its_token(kernels: CpuKernels, bad: float) -> None:
    stored, _ = draw_weight("e4m3", "float16", 9, 160, 5)
    for tokens in (2, 6):
        x = draw_activations(tokens, 160)
        x[1, 77] = bad
        (y,) = kernels.multiply([Product(x, describe_matrix(stored))])
        assert not torch.isfinite(y[1]).any()
        assert torch.isfinite(y[0]).all()
