"""Compiled kernels of every instruction set at hand against float64 and against the reference."""

import ctypes
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.kernels.build import find_compiler
from runtime.kernels.cpu import LEVELS, CpuKernels, Product, _Product, load_kernels
from runtime.kernels.matrices import StoredMatrix, describe_matrix
from runtime.kernels.reference import dequantize_stored
from tests.nan_outputs import nan_filled_outputs
from tests.runtime.kernels.stored_weights import Case, available_kernels, bound_error, draw_activations, make_weight

KERNELS = available_kernels()
# One row, primes, a row that ends inside every kind of vector, more rows than a tile of any kernel.
SHAPES = {
    16: ((1, 16), (37, 272)),
    32: ((3, 576), (35, 96)),
    64: ((5, 576), (33, 1280)),
    128: ((4, 128), (13, 1152)),
    256: ((2, 256), (7, 768)),
    None: ((1, 1), (13, 97), (70, 600)),
}
CASES = [
    Case(bits=bits, group_size=group_size, symmetric=symmetric, rows=rows, columns=columns)
    for bits in range(1, 9)
    for group_size, shapes in SHAPES.items()
    for rows, columns in shapes
    for symmetric in (False, True)
]

pytestmark = pytest.mark.skipif(not KERNELS and find_compiler() is None, reason="no C++ compiler is here")


@pytest.fixture(autouse=True)
def outputs_full_of_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nan_filled_outputs(monkeypatch):
        yield


def check_product(kernels: CpuKernels, case: Case, tokens: int, bias: Tensor | None = None, seed: int = 0) -> None:
    stored, dense = make_weight(case, seed)
    x = draw_activations(tokens, case.columns, seed + 1)
    (y,) = kernels.multiply([Product(x, describe_matrix(stored), bias)])
    expected = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    slack = 0 if bias is None else 2.0**-22 * (bias.double().abs() + expected.abs())
    assert ((y.double() - expected).abs() <= bound_error(case, dense, x) + slack).all()


def test_where_a_compiler_is_the_compiled_kernels_run() -> None:
    kernels = load_kernels()
    assert kernels is not None
    assert kernels.level in LEVELS


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_within_rounding_of_float64(case: Case) -> None:
    for kernels in KERNELS:
        for tokens in (1, 2, 3, 4, 5, 12, 13):
            check_product(kernels, case, tokens)


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    group_size=st.sampled_from([16, 32, 48, 64, 128, 256, None]),
    symmetric=st.booleans(),
    rows=st.integers(1, 80),
    groups=st.integers(1, 9),
    columns=st.integers(1, 700),
    tokens=st.integers(1, 40),
    biased=st.booleans(),
)
def test_products_of_any_shape(
    kernels: CpuKernels,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    rows: int,
    groups: int,
    columns: int,
    tokens: int,
    biased: bool,
) -> None:
    columns = columns if group_size is None else groups * group_size
    case = Case(bits=bits, group_size=group_size, symmetric=symmetric, rows=rows, columns=columns)
    check_product(kernels, case, tokens, torch.linspace(-3, 3, rows) if biased else None)


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
@pytest.mark.parametrize("tokens", [1, 4, 9, 33])
def test_default_error_is_small(kernels: CpuKernels, tokens: int) -> None:
    # An outlier of 20 standard deviations in every row: the relative error that the documentation promises.
    for bits in (2, 3, 4, 8):
        stored, dense = make_weight(Case(bits=bits, group_size=128, symmetric=True, rows=256, columns=2048), seed=bits)
        x = draw_activations(tokens, 2048)
        (y,) = kernels.multiply([Product(x, describe_matrix(stored))])
        expected = x.double() @ dense.double().T
        assert (y.double() - expected).norm() <= 2e-4 * expected.norm()


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
def test_products_of_one_call_are_those_of_single_calls(kernels: CpuKernels) -> None:
    cases = [
        Case(bits=bits, group_size=64, symmetric=bits % 2 == 0, rows=40 + bits, columns=64 * bits)
        for bits in (2, 3, 4, 8)
    ]
    weights = [make_weight(case, case.bits)[0] for case in cases] * 6
    products = [
        Product(draw_activations((0, 1, 2, 5, 11, 12, 13)[i % 7], w.columns, i), describe_matrix(w))
        for i, w in enumerate(weights)
    ]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for product, y in zip(products, kernels.multiply(products), strict=True):
                assert torch.allclose(y, kernels.multiply([product])[0], rtol=1e-5, atol=1e-5)
                assert y.shape == (product.x.shape[0], product.weight.rows)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
def test_prepared_products_are_computed_from_what_is_there_at_the_call(kernels: CpuKernels) -> None:
    weights = [make_weight(Case(bits=b, group_size=32, symmetric=False, rows=9, columns=96), b)[0] for b in (2, 5)]
    matrices = [describe_matrix(weight) for weight in weights]
    x = draw_activations(1, 96)
    outs, run = kernels.prepare([Product(x, matrix) for matrix in matrices])
    assert all(out.isnan().all() for out in outs)
    for seed in (1, 2):
        x.copy_(draw_activations(1, 96, seed))
        run()
        for out, matrix in zip(outs, matrices, strict=True):
            assert torch.equal(out, kernels.multiply_one(x, matrix, None))


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
@pytest.mark.parametrize("tokens", [2, 6, 14])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_stays_with_its_token(kernels: CpuKernels, tokens: int, bad: float) -> None:
    stored, _ = make_weight(Case(bits=4, group_size=32, symmetric=False, rows=9, columns=160))
    x = draw_activations(tokens, 160)
    x[1, 77] = bad
    (y,) = kernels.multiply([Product(x, describe_matrix(stored))])
    assert not torch.isfinite(y[1]).any()
    assert torch.isfinite(y[0]).all()


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
@pytest.mark.parametrize("factor", [0.0, 1e-38, 1e-20, 1e30])
def test_activations_of_any_magnitude(kernels: CpuKernels, factor: float) -> None:
    stored, dense = make_weight(Case(bits=3, group_size=64, symmetric=True, rows=6, columns=192))
    for tokens in (1, 5):
        x = draw_activations(tokens, 192) * factor
        (y,) = kernels.multiply([Product(x, describe_matrix(stored))])
        assert (y.double() - x.double() @ dense.double().T).norm() <= 2e-4 * (dense.norm() * x.norm()) + 1e-28


@settings(max_examples=80, deadline=None)
@given(
    bits=st.integers(1, 8),
    group_size=st.sampled_from([1, 7, 32, 64, None]),
    symmetric=st.booleans(),
    rows=st.integers(1, 20),
    groups=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_dequantized_rows_are_those_of_the_reference(
    bits: int, group_size: int | None, symmetric: bool, rows: int, groups: int, seed: int
) -> None:
    columns = groups * (group_size or 11)
    case = Case(bits=bits, group_size=group_size, symmetric=symmetric, rows=rows, columns=columns)
    stored, dense = make_weight(case, seed)
    kernels = load_kernels()
    assert kernels is not None
    assert torch.equal(kernels.dequantize(describe_matrix(stored)), dense)
    picked = torch.randint(0, rows, (5,), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(kernels.dequantize(describe_matrix(stored), picked), dense[picked])
    assert torch.equal(
        dequantize_stored(stored.codes, stored.scale, stored.zero_point, bits=bits, columns=columns), dense
    )


def test_every_float16_scale_is_read_as_it_is() -> None:
    scale = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16)[:, None]
    stored = StoredMatrix(torch.full((len(scale), 1), 5, dtype=torch.uint8), scale, None, 4, 1)
    kernels = load_kernels()
    assert kernels is not None
    assert torch.equal(kernels.dequantize(describe_matrix(stored)), scale.to(torch.float32) * -3.0)


def test_tensors_elsewhere_are_refused() -> None:
    stored, _ = make_weight(Case(bits=4, group_size=32, symmetric=True, rows=8, columns=64))
    with pytest.raises(ValueError, match="must be contiguous on the CPU"):
        describe_matrix(stored._replace(codes=stored.codes.T.contiguous().T))
    with pytest.raises(ValueError, match="must be contiguous on the CPU"):
        describe_matrix(stored._replace(scale=stored.scale.to("meta")))


def test_activations_without_memory_are_refused() -> None:
    stored, _ = make_weight(Case(bits=4, group_size=32, symmetric=True, rows=8, columns=64))
    matrix, kernels = describe_matrix(stored), load_kernels()
    assert kernels is not None
    if kernels.level == "portable":
        pytest.skip("the portable kernels keep activations as they are")
    job = _Product(ctypes.addressof(matrix), 0, 0, 0, 2**48)
    with pytest.raises(MemoryError, match="memory for the activations of 1 products"):
        kernels._run(ctypes.byref(job), 1)


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one that this processor has: got 'sse9'"):
        load_kernels("sse9")


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_one_group_and_of_many_blocks(kernels: CpuKernels, symmetric: bool) -> None:
    """Activations of such a row have more steps than a vector has lanes, and its weights one scale."""
    for bits in (2, 4, 5, 8):
        case = Case(bits=bits, group_size=None, symmetric=symmetric, rows=21, columns=4500)
        for tokens in (1, 2, 4, 13):
            check_product(kernels, case, tokens)
