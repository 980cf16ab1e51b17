"""Packed weights of several parts by the Triton kernels in the interpreter: their reference's products.

The bound of each is derived from what the reference is a sum of: twice a chain of float32 additions of terms as large
as the greatest code float, and what rounding to 16 bits adds.
"""

import pytest
import torch
from torch import Tensor

from runtime.apply import pack_weight
from runtime.formats import FORMATS
from runtime.kernels.triton.column_linear import ColumnParts
from runtime.kernels.triton.group_mixture_layout import MixedGroups
from runtime.kernels.triton.packed_product import packed_linear
from runtime.kernels.triton.residual_linear import ResidualBlocks
from runtime.packed import PackedWeight, QuantizedLinear
from runtime.read_widths import read_at_width
from tests.gpu_kernels.interpreted.products import ROUNDING, find_greatest_code

# Additions one after the other: the codes of a step, then groups, parts and splits.
CHAIN = 128 + 64
KINDS = ("planes", "nested", "double_rounding", "column_mixture", "group_mixture")
NAMES = [name for name, format_ in FORMATS.items() if format_.kind in KINDS and format_.fits(128)]
BLOCKS = [name for name, format_ in FORMATS.items() if format_.kind == "residual_blocks"]
TYPES = (torch.float16, torch.bfloat16, torch.float32)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_weight(name: str, rows: int = 11, columns: int = 128) -> PackedWeight:
    """Returns a packed weight whose columns differ, so that mixtures choose some of them."""
    dense = draw(rows, columns)
    dense[:, ::5] *= 8
    return pack_weight(dense, FORMATS[name])


def find_greatest_terms(weight: PackedWeight, dtype: torch.dtype) -> float:
    """Returns the greatest of what is added, for each unit of x: the code floats of all parts, in weights."""
    kept = weight.__dict__["_fragments"][1]
    if isinstance(kept, ColumnParts):
        return sum(
            part.factor * float(part.scale.abs().max()) * find_greatest_code(part.bits, dtype) for part in kept.parts
        )
    if isinstance(kept, MixedGroups):
        outliers = float(kept.outlier.abs().max()) if kept.outlier.numel() else 0.0
        return 1.25 * float(kept.scale.abs().max()) * find_greatest_code(2, dtype) + outliers
    read = kept[weight.width]
    floats = sum(part.factor * find_greatest_code(part.bits, dtype) for part in read.parts)
    return floats * float(read.scale.float().abs().max())


def check_product(weight: PackedWeight, x: Tensor, bias: Tensor | None = None) -> None:
    y = packed_linear(x, weight, bias)
    assert y is not None and y.dtype == x.dtype
    expected = x.double() @ weight().double().t() + (0 if bias is None else bias.double())
    terms = find_greatest_terms(weight, x.dtype) * x.double().abs().sum(-1, keepdim=True)
    bound = 2 * CHAIN * 2.0**-24 * terms + ROUNDING[x.dtype] * expected.abs()
    assert bool(((y.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("name", NAMES)
def test_every_format_multiplies_as_its_reference(name: str) -> None:
    weight = draw_weight(name)
    check_product(weight, draw(2, 3, 128, seed=1))


@pytest.mark.parametrize("dtype", TYPES, ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(
    "name",
    [
        "bcq3_g64",
        "dual_binary_g64",
        "nested8_g64",
        "nested4_6_g32",
        "int4_top12int8_g64",
        "int1_top20int4_g64",
        "int2_mix25int4_g64_outliers",
    ],
)
def test_every_type_of_activations(name: str, dtype: torch.dtype) -> None:
    weight = draw_weight(name, rows=70, columns=192)
    x, bias = draw(5, 192, seed=1).to(dtype), draw(70, seed=2).to(dtype)
    check_product(weight, x, bias)


@pytest.mark.parametrize(("rows", "columns"), [(1, 97), (67, 130)])
@pytest.mark.parametrize(
    "name", ["bcq4_channel", "nested8_channel", "nested4_8_channel", "int1_top20int4_channel", "int4_top12int8_channel"]
)
def test_rows_of_any_length(name: str, rows: int, columns: int) -> None:
    weight = draw_weight(name, rows=rows, columns=columns)
    check_product(weight, draw(1, columns, seed=1).to(torch.float16))
    check_product(weight, draw(0, columns, seed=1).to(torch.float16))


@pytest.mark.parametrize("name", ["bcq2_g64", "nested4_8_g64", "int4_top12int8_g64"])
@pytest.mark.parametrize("dtype", TYPES[:2], ids=["fp16", "bf16"])
def test_many_rows_multiply_the_reference_weight(name: str, dtype: torch.dtype) -> None:
    weight = draw_weight(name)
    x = draw(66, 128, seed=1).to(dtype)
    y = packed_linear(x, weight, None)
    assert y is not None
    # The same weight; a mixture's columns are added in another order.
    dense = weight().to(dtype).double()
    expected = x.double() @ dense.t()
    rounding = torch.finfo(dtype).eps / 2 * expected.abs()
    assert bool(
        ((y.double() - expected).abs() <= rounding + 128 * 2.0**-24 * (x.double().abs() @ dense.abs().t())).all()
    )


@pytest.mark.parametrize("name", ["nested8_g64", "nested4_6_g64", "nested4_8_channel"])
def test_nested_weights_are_read_at_each_width(name: str) -> None:
    weight = draw_weight(name)
    x = draw(3, 128, seed=1).to(torch.float16)
    products = []
    for width in weight.format.widths:
        with read_at_width(weight, width):
            check_product(weight, x)
            products.append(packed_linear(x, weight, None))
    assert not torch.equal(products[0], products[-1])
    # One tensor of words for all widths, of which the lower ones read the beginning.
    read = weight.__dict__["_fragments"][1]
    assert len({some.words.data_ptr() for some in read.values()}) == 1
    assert [some.bits for some in read.values()] == list(weight.format.widths)


@pytest.mark.parametrize("name", [*NAMES, *BLOCKS])
def test_no_format_is_read_at_more_bytes_than_it_is_stored_in(name: str) -> None:
    """But for padding: parts of columns become whole tiles."""
    format_ = FORMATS[name]
    weight = draw_weight(name, rows=16, columns=640)
    assert packed_linear(draw(0, 640), weight, None) is not None
    kept = weight.__dict__["_fragments"][1]
    stored_bytes = format_.storage_bytes(weight.shape)
    if isinstance(kept, ColumnParts):
        read_bytes = sum(part.read_bytes for part in kept.parts)
        stored = zip((format_.mixture.wide, format_.mixture.narrow), kept.parts, strict=True)
        stored_bytes = sum(some.storage_bytes((16, part.shape[1] + -part.shape[1] % 64)) for some, part in stored)
    elif isinstance(kept, MixedGroups):
        # Flags are stored as whole bytes of a row, and where each 32 of them begin is not stored.
        read_bytes = kept.read_bytes - kept.flags.nbytes - kept.starts.nbytes + weight.mask.nbytes
        assert kept.flags.nbytes == kept.starts.nbytes == 4 and weight.mask.nbytes <= 4
    elif isinstance(kept, ResidualBlocks):
        read_bytes = sum(tensor.nbytes for tensor in (kept.words, kept.left, kept.right))
    else:
        read_bytes = kept[format_.bits].read_bytes
    if format_.kind == "nested":
        # The scales of lower widths are not read.
        stored_bytes -= weight.scale_4.nbytes + weight.scale_6.nbytes
    # Zero points of a row are stored as whole bytes.
    has_zero_points = format_.kind in ("column_mixture", "group_mixture")
    assert read_bytes <= stored_bytes if has_zero_points else read_bytes == stored_bytes


ONE_OF_EACH = ["bcq3_g64", "nested4_8_g64", "int4_top12int8_g64", "int2_mix25int4_g64_outliers", "bitstack2_r16"]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_layers_use_the_kernels_and_compile_as_one_operation(name: str) -> None:
    weight, x = draw_weight(name), draw(2, 128, seed=1)
    layer = QuantizedLinear(weight)
    y = layer(x)
    assert weight.__dict__["_fragments"][1] is not None
    assert torch.equal(packed_linear(x, weight, None), y)
    compiled = torch.compile(lambda x: packed_linear(x, weight, None), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), y)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_layout_is_made_again_when_the_weight_changes(name: str) -> None:
    weight, x = draw_weight(name), draw(2, 128, seed=1)
    packed_linear(x, weight, None)
    kept = weight.__dict__["_fragments"][1]
    packed_linear(x, weight, None)
    assert weight.__dict__["_fragments"][1] is kept
    codes = next(tensor for tensor_name, tensor in weight.tensors.items() if tensor_name.startswith("codes"))
    before = packed_linear(x, weight, None)
    codes.bitwise_not_()
    assert not torch.equal(packed_linear(x, weight, None), before)


def test_powers_of_two_of_any_size() -> None:
    weight = pack_weight(draw(8, 128), FORMATS["bcq2_g64_pow2"])
    weight.scale += 70
    weight.scale[0, 0, 0] = -126
    check_product(weight, draw(3, 128, seed=1))
    # The least of all is read as zero.
    weight.scale[0, 0, 0] = -127
    assert packed_linear(draw(3, 128), weight, None) is None


@pytest.mark.parametrize("name", ["int2_mix25int4_g32", "int2_mix25int4_g32_outliers"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (9, 96), (67, 1056)])
def test_mixed_groups_of_any_number(name: str, rows: int, columns: int) -> None:
    """One group, which is narrow; an odd number; more than a word of flags holds, in several blocks of rows."""
    weight = draw_weight(name, rows=rows, columns=columns)
    check_product(weight, draw(2, columns, seed=1).to(torch.float16), draw(rows, seed=2).to(torch.float16))


@pytest.mark.parametrize("dtype", TYPES, ids=["fp16", "bf16", "fp32"])
def test_mixed_groups_and_many_rows(dtype: torch.dtype) -> None:
    check_product(draw_weight("int2_mix25int4_g64_outliers"), draw(67, 128, seed=1).to(dtype))


def test_mixed_groups_whose_scales_are_too_great_are_left_to_others() -> None:
    weight = draw_weight("int2_mix25int4_g32")
    x = draw(2, 128, seed=1)
    assert packed_linear(x, weight, None) is not None
    weight.scale_wide.fill_(2.0**14)
    assert packed_linear(x, weight, None) is None


def bound_blocks(weight: PackedWeight, x: Tensor) -> Tensor:
    """Returns how far a product with residual blocks may be: of all |U| |V| |x|, what rounding V x leaves.

    Once to float16, or to its two parts, and twice a chain of float32 additions over rows of 6 steps of one bit.
    """
    left, right = weight.left.double().abs(), weight.right.double().abs()
    terms = torch.einsum("bnr,brk,mk->mn", left, right, x.double().abs())
    once = 2.0**-22 if x.dtype == torch.float32 else 2.0**-11
    greatest = torch.einsum("bnr,brm->mn", left, (right.unsqueeze(2) * x.double().abs()).amax(-1))
    # An element below 2**-24 of the greatest of its row, or below 2**-35 in two parts, is lost.
    lost = x.shape[-1] * greatest * (2.0**-35 if x.dtype == torch.float32 else 2.0**-24)
    return terms * (once + 2 * 6 * (CHAIN + 32) * 2.0**-24) + lost


@pytest.mark.parametrize("dtype", TYPES, ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        *((name, 11, 128) for name in BLOCKS),
        ("bitstack2_r16", 3, 97),
        ("bitstack3_r16", 130, 64),
        ("bitstack1_r4", 1, 1),
    ],
)
def test_residual_blocks(name: str, rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = draw_weight(name, rows=rows, columns=columns)
    x, bias = draw(2, columns, seed=1).to(dtype), draw(rows, seed=2).to(dtype)
    y = packed_linear(x, weight, bias)
    assert y is not None and y.dtype == dtype
    expected = x.double() @ weight().double().t() + bias.double()
    bound = bound_blocks(weight, x) + ROUNDING[dtype] * expected.abs()
    assert bool(((y.double() - expected).abs() <= bound).all())


def test_residual_blocks_and_more_rows_than_are_held_at_once() -> None:
    weight = draw_weight("bitstack1_r4", rows=9, columns=64)
    x = draw(66, 64, seed=1).to(torch.float16)
    y = packed_linear(x, weight, None)
    assert y is not None
    assert torch.equal(y[63:], packed_linear(x[63:], weight, None))
    assert packed_linear(draw(513, 64), weight, None) is None
