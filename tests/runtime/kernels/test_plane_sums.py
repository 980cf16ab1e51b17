"""Products of weights that are sums of planes, of every instruction set at hand, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.apply import pack_weight
from runtime.formats import FORMATS
from runtime.kernels.build import find_compiler
from runtime.kernels.cpu import CpuKernels, Product, load_kernels
from runtime.kernels.matrices import (
    MOST_PLANES,
    ColumnPart,
    Matrix,
    StoredMatrix,
    describe_floats,
    describe_matrix,
    sum_planes,
)
from runtime.kernels.stored_planes import stored_planes
from runtime.packed import QuantizedLinear
from runtime.packing import unpack_codes
from tests.runtime.kernels.stored_weights import (
    FLOAT_EPS,
    Case,
    available_kernels,
    bound_error,
    draw_activations,
    make_weight,
)

KERNELS = available_kernels()
pytestmark = pytest.mark.skipif(not KERNELS and find_compiler() is None, reason="no C++ compiler is here")
# Those of 48 columns have kernels on no instruction set: rows are read back.
GROUP_SIZES = (16, 32, 48, 64, 128, None)


def read_in_float64(stored: StoredMatrix) -> Tensor:
    """Returns factor * scale * (code - zero point) of a plane, [rows, columns]."""
    groups = stored.scale.shape[1]
    zero: Tensor | float | None = stored.centre
    if stored.zero_point is not None:
        zero = unpack_codes(stored.zero_point, stored.bits, groups).double().unsqueeze(-1)
    elif zero is None:
        zero = 2.0 ** (stored.bits - 1)
    codes = unpack_codes(stored.codes, stored.bits, stored.columns).double().view(-1, groups, stored.columns // groups)
    return (stored.factor * stored.scale.double().unsqueeze(-1) * (codes - zero)).flatten(1)


def draw_planes(cases: list[Case], factors: list[float]) -> list[StoredMatrix]:
    """Returns a plane for each case; every other symmetric one has its centre between two codes."""
    planes = []
    for i, (case, factor) in enumerate(zip(cases, factors, strict=True)):
        stored, _ = make_weight(case, i)
        planes.append(stored._replace(factor=factor, centre=i + 0.5 if case.symmetric and i % 2 else None))
    return planes


def bound_sum(cases: list[Case], planes: list[StoredMatrix], x: Tensor) -> Tensor:
    """Returns what the sum of the planes' products with x may be off by."""
    dense = [read_in_float64(plane) for plane in planes]
    parts = [
        abs(plane.factor) * bound_error(case, values / plane.factor, x)
        for case, plane, values in zip(cases, planes, dense, strict=True)
    ]
    added = sum(x.double().abs() @ values.abs().T for values in dense)
    return sum(parts) + 2 * len(planes) * FLOAT_EPS * added


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 150), tokens=st.integers(1, 12), biased=st.booleans())
def test_products_of_any_shape(kernels: CpuKernels, data: st.DataObject, rows: int, tokens: int, biased: bool) -> None:
    # A multiple of all the group sizes that are drawn.
    sizes = data.draw(st.lists(st.sampled_from(GROUP_SIZES), min_size=1, max_size=MOST_PLANES))
    columns = 384 if any(sizes) else data.draw(st.integers(1, 300))
    cases = [
        Case(bits=data.draw(st.integers(1, 8)), group_size=size, symmetric=data.draw(st.booleans()), rows=rows,
             columns=columns)
        for size in sizes
    ]  # fmt: skip
    planes = draw_planes(cases, [data.draw(st.sampled_from([1.0, -0.7, 16.0, 2.0**-6])) for _ in cases])
    x = draw_activations(tokens, columns)
    bias = torch.linspace(-3, 3, rows) if biased else None
    weight = sum_planes([describe_matrix(plane) for plane in planes])
    (y,) = kernels.multiply([Product(x, weight, bias)])
    expected = x.double() @ sum(map(read_in_float64, planes)).T + (0 if bias is None else bias.double())
    slack = 0 if bias is None else 2.0**-22 * (bias.double().abs() + expected.abs())
    assert ((y.double() - expected).abs() <= bound_sum(cases, planes, x) + slack).all()


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
@settings(max_examples=40, deadline=None)
@given(data=st.data(), rows=st.integers(1, 70), inputs=st.integers(2, 500), tokens=st.integers(1, 9))
def test_planes_of_some_columns(kernels: CpuKernels, data: st.DataObject, rows: int, inputs: int, tokens: int) -> None:
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs)).to(torch.int32)
    split = data.draw(st.integers(1, inputs - 1))
    parts = [ColumnPart(index.contiguous(), inputs) for index in (order[:split], order[split:])]
    cases = [
        Case(bits=data.draw(st.integers(1, 8)), group_size=None, symmetric=False, rows=rows, columns=len(part.columns))
        for part in parts
    ]
    planes = [plane._replace(part=part) for plane, part in zip(draw_planes(cases, [1.0, -0.5]), parts, strict=True)]
    weight = sum_planes([describe_matrix(plane) for plane in planes])
    x, dense, bound = draw_activations(tokens, inputs), torch.zeros(rows, inputs, dtype=torch.float64), 0.0
    for case, plane, part in zip(cases, planes, parts, strict=True):
        dense[:, part.columns] = read_in_float64(plane)
        bound = bound + bound_sum([case], [plane], x[:, part.columns])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            (y,) = kernels.multiply([Product(x, weight)])
            assert (
                (y.double() - x.double() @ dense.T).abs() <= bound + 2.0**-22 * (x.double().abs() @ dense.abs().T)
            ).all()
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(kernels.dequantize(weight).double(), dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
def test_planes_of_other_kinds_and_of_an_execution_layout_are_added(kernels: CpuKernels) -> None:
    case = Case(bits=2, group_size=64, symmetric=True, rows=150, columns=384)
    (stored,) = draw_planes([case], [0.5])
    plain = describe_matrix(stored)
    memory = torch.zeros(kernels.lookup_bytes(plain), dtype=torch.uint8)
    floats = torch.randn(150, 384, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    if len(memory):
        kernels.pack_lookup_(plain, memory)
    planes = [describe_floats(floats), describe_matrix(stored, memory if len(memory) else None), plain]
    weight = sum_planes(planes)
    dense = floats.double() + 2 * read_in_float64(stored)
    assert torch.allclose(kernels.dequantize(weight).double(), dense, atol=1e-5)
    for tokens in (1, 3, 7):
        x = draw_activations(tokens, 384)
        (y,) = kernels.multiply([Product(x, weight)])
        assert (y - x.double() @ dense.T).norm() <= 2e-4 * (x.double() @ dense.T).norm()


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
def test_threads_share_the_rows(kernels: CpuKernels) -> None:
    # Views hold addresses alone.
    products, kept = [], []
    for i, sizes in enumerate([(32, 64), (None,), (16, 48, 32), (64, 64)]):
        cases = [Case(bits=i + 2, group_size=g, symmetric=True, rows=90 + i, columns=768) for g in sizes]
        kept.append(draw_planes(cases, [0.5] * len(sizes)))
        weight = sum_planes([describe_matrix(plane) for plane in kept[-1]])
        products.append(Product(draw_activations(1 + 4 * (i % 2), 768, i), weight))
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(kernels.multiply(products))
    finally:
        torch.set_num_threads(threads)
    for product, *ys in zip(products, *found, strict=True):
        # Rows that are multiplied in other numbers together are summed in another order.
        (alone,) = kernels.multiply([product])
        assert all(torch.allclose(y, alone, rtol=1e-5, atol=1e-5 * float(alone.abs().max())) for y in ys)


@pytest.mark.parametrize("level", [kernels.level for kernels in KERNELS])
@pytest.mark.parametrize(
    "format_name",
    [
        "nested4_8_g32",
        "nested4_6_channel",
        "nested8_g64",
        "nested8_channel",
        "int1_g32",
        "int1_g32_sym",
        "int1_top20int4_g64",
        "int1_top20int4_channel",
        "int4_top12int8_g64",
        "int4_top12int8_channel",
    ],
)
def test_planes_of_stored_weights_add_up_to_them_at_every_width(format_name: str, level: str) -> None:
    kernels = load_kernels(level)
    assert kernels is not None
    weight = pack_weight(torch.randn(37, 384, generator=torch.Generator().manual_seed(3)), FORMATS[format_name])
    for width in weight.format.widths:
        weight.width = width
        planes = stored_planes(weight)
        dense = weight()
        view: Matrix = sum_planes([describe_matrix(plane) for plane in planes])
        assert torch.allclose(kernels.dequantize(view), dense, rtol=1e-6, atol=1e-7)
        x = draw_activations(2, 384)
        (y,) = kernels.multiply([Product(x, view)])
        assert (y - x.double() @ dense.double().T).norm() <= 2e-4 * (x.double() @ dense.double().T).norm()


def test_columns_that_were_written_to_are_read_anew() -> None:
    """The mask of a mixture is overwritten where it lies: the view holds which columns it names."""
    weights = [
        pack_weight(torch.randn(19, 384, generator=torch.Generator().manual_seed(seed)), FORMATS["int4_top12int8_g64"])
        for seed in (1, 2)
    ]
    x = draw_activations(2, 384)
    linears = [QuantizedLinear(weight) for weight in weights]
    before, expected = (linear(x) for linear in linears)
    linears[0].load_state_dict(linears[1].state_dict())
    assert torch.equal(linears[0](x), expected)
    assert not torch.allclose(before, expected)


def test_a_mask_that_does_not_name_the_columns_of_the_parts_is_refused() -> None:
    # Otherwise the kernels would read beyond the codes.
    weight = pack_weight(torch.randn(8, 384, generator=torch.Generator().manual_seed(1)), FORMATS["int4_top12int8_g64"])
    weight.get_buffer("mask").zero_()
    with pytest.raises(ValueError, match="must name the columns that its parts hold: got 384 of the narrow part"):
        QuantizedLinear(weight)(draw_activations(1, 384))
