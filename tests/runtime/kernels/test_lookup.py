"""Products by lookup against float64, and their execution layout against the stored one."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime.apply import pack_weight
from runtime.formats import find_format
from runtime.kernels.cpu import Product, load_kernels
from runtime.kernels.dispatch import kernel_path
from runtime.kernels.matrices import Matrix, StoredMatrix, describe_matrix
from runtime.kernels.weight_views import execution_bytes, find_matrix, use_execution_
from runtime.packed import QuantizedLinear
from runtime.packing import unpack_codes
from tests.nan_outputs import nan_filled_outputs
from tests.runtime.kernels.stored_weights import Case, bound_error, draw_activations, make_weight

KERNELS = load_kernels()
pytestmark = pytest.mark.skipif(
    KERNELS is None or KERNELS.level != "avx512", reason="the processor has no AVX-512 VBMI"
)

LARGEST_ACTIVATION = 16383
TILE, CHUNK, SPAN = 16, 4, 32


@pytest.fixture(autouse=True)
def outputs_full_of_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nan_filled_outputs(monkeypatch):
        yield


def lay_out(stored: StoredMatrix) -> Matrix:
    """Returns the view of a weight with its execution layout."""
    assert KERNELS is not None
    plain = describe_matrix(stored)
    memory = torch.zeros(KERNELS.lookup_bytes(plain), dtype=torch.uint8)
    KERNELS.pack_lookup_(plain, memory)
    return describe_matrix(stored, memory)


@settings(max_examples=150, deadline=None)
@given(
    bits=st.integers(1, 3),
    group_size=st.sampled_from([32, 64, 128, 256, None]),
    symmetric=st.booleans(),
    rows=st.integers(1, 150),
    groups=st.integers(1, 9),
    columns=st.integers(1, 700),
    tokens=st.integers(1, 4),
    biased=st.booleans(),
)
def test_products_of_any_shape(
    bits: int, group_size: int | None, symmetric: bool, rows: int, groups: int, columns: int, tokens: int, biased: bool
) -> None:
    assert KERNELS is not None
    columns = columns if group_size is None else groups * group_size
    case = Case(bits=bits, group_size=group_size, symmetric=symmetric, rows=rows, columns=columns)
    stored, dense = make_weight(case, rows)
    x = draw_activations(tokens, columns)
    bias = torch.linspace(-3, 3, rows) if biased else None
    (y,) = KERNELS.multiply([Product(x, lay_out(stored), bias)])
    expected = x.double() @ dense.double().T + (0 if bias is None else bias.double())
    slack = 0 if bias is None else 2.0**-22 * (bias.double().abs() + expected.abs())
    assert ((y.double() - expected).abs() <= bound_error(case, dense, x, LARGEST_ACTIVATION) + slack).all()


def test_the_largest_sums_of_activations_do_not_overflow() -> None:
    # All activations of a quad at the largest magnitude, of either sign: the widest sums a table can hold.
    assert KERNELS is not None
    signs = torch.tensor([[1.0 if index >> i & 1 else -1.0 for i in range(4)] for index in range(16)])
    x = (signs.reshape(1, 64) * torch.ones(1, 64)).contiguous()
    case = Case(bits=3, group_size=64, symmetric=False, rows=64, columns=64)
    stored, dense = make_weight(case)
    (y,) = KERNELS.multiply([Product(x, lay_out(stored))])
    # Every activation is a whole number of steps, so nothing is rounded but float32.
    assert ((y.double() - x.double() @ dense.double().T).abs() <= 64 * 2.0**-22 * 1.1 * 8 * 64).all()


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 4])
def test_default_error_is_small(bits: int, tokens: int) -> None:
    # An outlier of 20 standard deviations in every row: the relative error that the documentation promises.
    assert KERNELS is not None
    stored, dense = make_weight(Case(bits=bits, group_size=128, symmetric=True, rows=256, columns=2048), seed=bits)
    x = draw_activations(tokens, 2048)
    (y,) = KERNELS.multiply([Product(x, lay_out(stored))])
    expected = x.double() @ dense.double().T
    assert (y.double() - expected).norm() <= 2e-4 * expected.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_stays_with_its_token(bad: float) -> None:
    assert KERNELS is not None
    stored, _ = make_weight(Case(bits=2, group_size=32, symmetric=False, rows=70, columns=160))
    x = draw_activations(2, 160)
    x[1, 77] = bad
    (y,) = KERNELS.multiply([Product(x, lay_out(stored))])
    assert not torch.isfinite(y[1]).any()
    assert torch.isfinite(y[0]).all()


def test_threads_share_the_rows() -> None:
    assert KERNELS is not None
    cases = [
        Case(bits=b, group_size=64, symmetric=b == 2, rows=rows, columns=512) for b in (1, 2, 3) for rows in (65, 300)
    ]
    products = [
        Product(draw_activations(1 + i % 4, 512, i), lay_out(make_weight(c, i)[0])) for i, c in enumerate(cases)
    ]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = KERNELS.multiply(products)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(alone, KERNELS.multiply(products), strict=True))
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 3),
    group_size=st.sampled_from([32, 128, None]),
    symmetric=st.booleans(),
    rows=st.integers(1, 150),
    groups=st.integers(1, 5),
    columns=st.integers(1, 300),
)
def test_the_layout_holds_the_stored_codes_scales_and_zero_points(
    bits: int, group_size: int | None, symmetric: bool, rows: int, groups: int, columns: int
) -> None:
    assert KERNELS is not None
    columns = columns if group_size is None else groups * group_size
    case = Case(bits=bits, group_size=group_size, symmetric=symmetric, rows=rows, columns=columns)
    stored, _ = make_weight(case, columns)
    memory = lay_out(stored).lookup_memory.numpy()
    count = stored.scale.shape[1]
    tiles, spans = -(-rows // TILE), -(-columns // SPAN)
    sizes = [tiles * spans * bits * 64, tiles * count * 32, 0 if symmetric else tiles * count * 2 * bits]
    assert sum(sizes) <= len(memory) <= sum(sizes) + 64
    codes, scale, zeros = np.split(memory[: sum(sizes)], np.cumsum(sizes)[:2])
    found = np.concatenate([read_nibbles(part, bits) for part in by_tile(codes, tiles, spans, bits * 64)])
    assert np.array_equal(found[:rows, :columns], unpack_codes(stored.codes, bits, columns).numpy())
    found = np.concatenate([part.view(np.float16).T for part in by_tile(scale, tiles, count, 32)])
    assert np.array_equal(found[:rows], stored.scale.numpy())
    if stored.zero_point is not None:
        parts = by_tile(zeros, tiles, count, 2 * bits)
        found = np.concatenate([unpack_codes(torch.from_numpy(part), bits, TILE).numpy().T for part in parts])
        assert np.array_equal(found[:rows], unpack_codes(stored.zero_point, bits, count).numpy())


def by_tile(region: NDArray[np.uint8], tiles: int, steps: int, size: int) -> list[NDArray[np.uint8]]:
    """Returns [steps, size] of each tile out of chunks [steps, tiles of the chunk, size]."""
    each = []
    for first in range(0, tiles, CHUNK):
        count = min(CHUNK, tiles - first)
        chunk = region[first * steps * size : (first + count) * steps * size].reshape(steps, count, size)
        each += [np.ascontiguousarray(chunk[:, i]) for i in range(count)]
    return each


def read_nibbles(tile: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Returns the codes [16, columns] of a tile [spans, bits * 64]: nibble 4 * row + quad of a plane and half span."""
    vectors = tile.reshape(len(tile), bits, TILE, 4)
    nibbles = np.stack([vectors & 15, vectors >> 4], axis=2).reshape(len(tile), 2 * bits, TILE, 4)
    codes = np.zeros((TILE, len(tile), 2, 4, 4), dtype=np.uint8)
    for half in range(2):
        for plane in range(bits):
            place = half if bits == 1 else 2 * half + plane if plane < 2 else 4 + half
            for bit in range(4):
                codes[:, :, half, :, bit] |= (nibbles[:, place].transpose(1, 0, 2) >> bit & 1) << plane
    return codes.reshape(TILE, -1)


@pytest.mark.parametrize("case", [(4, 64), (3, 16)], ids=["4 bits", "groups of 16"])
def test_other_weights_have_no_layout(case: tuple[int, int]) -> None:
    assert KERNELS is not None
    bits, group_size = case
    stored, _ = make_weight(Case(bits=bits, group_size=group_size, symmetric=True, rows=8, columns=64))
    assert KERNELS.lookup_bytes(describe_matrix(stored)) == 0
    other = load_kernels("portable")
    assert other is not None
    stored, _ = make_weight(Case(bits=2, group_size=64, symmetric=True, rows=8, columns=64))
    assert other.lookup_bytes(describe_matrix(stored)) == 0


def make_linear(seed: int = 0, format_name: str = "int2_g64") -> QuantizedLinear:
    weight = torch.randn(70, 384, generator=torch.Generator().manual_seed(seed)) + 0.2
    linear = QuantizedLinear(pack_weight(weight, find_format(format_name)))
    assert KERNELS is not None
    memory = torch.zeros(execution_bytes(linear.weight, KERNELS), dtype=torch.uint8)
    use_execution_(linear.weight, KERNELS, memory)
    return linear


def reads_layout(linear: QuantizedLinear) -> bool:
    matrix = find_matrix(linear.weight, torch.device("cpu"))
    return matrix is not None and matrix.lookup != 0


@pytest.mark.parametrize("format_name", ["int1_g64", "int1_g32_sym", "int1_channel", "int2_g128", "int3_channel_sym"])
def test_formats_of_few_bits_are_within_rounding_of_float64(format_name: str) -> None:
    linear = make_linear(3, format_name)
    assert reads_layout(linear)
    for tokens in (1, 4):
        x = draw_activations(tokens, 384)
        expected = x.double() @ linear.weight().double().T
        assert (linear(x) - expected).norm() <= 2e-4 * expected.norm()


def test_a_layer_computes_by_its_layout_until_other_numbers_are_loaded() -> None:
    linear, other = make_linear(0), make_linear(1)
    x = draw_activations(2, 384)
    with kernel_path("reference"):
        expected, expected_other = linear(x), other(x)
    assert reads_layout(linear)
    assert (linear(x) - expected).norm() <= 2e-4 * expected.norm()
    linear.load_state_dict(other.state_dict())
    assert not reads_layout(linear)
    assert (linear(x) - expected_other).norm() <= 2e-4 * expected_other.norm()


def test_copies_and_weights_that_moved_have_none() -> None:
    linear = make_linear()
    copied = copy.deepcopy(linear)
    x = draw_activations(1, 384)
    expected = linear(x)
    del linear
    assert not reads_layout(copied)
    assert (copied(x) - expected).norm() <= 2e-4 * expected.norm()
    moved = make_linear().to("meta")
    assert moved(x.to("meta")).shape == (1, 70)
    assert "_execution" not in moved.weight.__dict__


def test_more_tokens_than_a_lookup_serves_read_the_stored_layout() -> None:
    linear = make_linear()
    x = draw_activations(9, 384)
    with kernel_path("reference"):
        expected = linear(x)
    assert (linear(x) - expected).norm() <= 2e-4 * expected.norm()
