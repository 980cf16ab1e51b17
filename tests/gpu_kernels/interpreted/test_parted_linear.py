"""Products with sums of parts in Triton's interpreter against float64: planes, nested widths, every class of shape."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from runtime.kernels.triton.parted_layout import CodePart, PartedWeight, pack_parts
from runtime.kernels.triton.parted_linear import dequantize_parts, parted_linear, parted_linear_op
from tests.gpu_kernels.interpreted.products import ROUNDING, find_greatest_code

HALF_TYPES = (torch.float16, torch.bfloat16)
PLANE = CodePart(bits=1, zero=0.5, factor=2.0)
BIT = CodePart(bits=1, zero=0.0, factor=1.0)
NESTED = (
    CodePart(bits=4, zero=7.5, factor=16.0),
    CodePart(bits=2, zero=1.5, factor=4.0),
    CodePart(bits=2, zero=1.5, factor=1.0),
)
TWICE_ROUNDED = (CodePart(bits=4, zero=8.0, factor=1.0), CodePart(bits=4, zero=8.0, factor=1 / 16))


@dataclass(frozen=True, kw_only=True)
class Sum:
    """A product with a sum of parts: y [rows, out_features] = x W' + bias."""

    parts: tuple[CodePart, ...]
    each_scaled: bool = False
    dtype: torch.dtype = torch.float16
    rows: int = 3
    out_features: int = 72
    in_features: int = 128
    group_size: int | None = 64
    bias: bool = False

    def __str__(self) -> str:
        parts = "+".join(f"{part.bits}z{part.zero:g}" for part in self.parts)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{parts}-{dtype}-{self.rows}x{self.out_features}x{self.in_features}-g{self.group_size}"


def draw_weight(case: Sum, generator: torch.Generator) -> tuple[PartedWeight, Tensor, Tensor]:
    """Returns the weight, packed and in float64, and what float32 rounds for each weight and unit of x.

    That is, of every part, the greatest of its code floats and of what is subtracted from them, in weights.
    """
    shape = (case.out_features, case.in_features)
    groups = 1 if case.group_size is None else case.in_features // case.group_size
    codes = [torch.randint(0, 1 << p.bits, shape, dtype=torch.uint8, generator=generator) for p in case.parts]
    sizes = (case.out_features, groups, len(case.parts))
    scale = (torch.rand(sizes, generator=generator) * 0.02 + 1e-3).to(torch.float16)
    scale = scale if case.each_scaled else scale[..., 0]
    weight = pack_parts(codes, scale, case.parts, group_size=case.group_size)
    dense, greatest = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for i, (part, some) in enumerate(zip(case.parts, codes, strict=True)):
        each = (scale[..., i] if case.each_scaled else scale).double().repeat_interleave(shape[1] // groups, dim=1)
        dense += each * part.factor * (some.double() - part.zero)
        greatest += each * part.factor * find_greatest_code(part.bits, case.dtype)
    return weight, dense, greatest


def draw_rows(case: Sum, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    x = torch.randn(case.rows, case.in_features, generator=generator)
    x[:, case.in_features // 3] *= 20
    bias = torch.randn(case.out_features, generator=generator).to(case.dtype) if case.bias else None
    return x.to(case.dtype), bias


CASES = [
    *(Sum(parts=(PLANE,) * n, each_scaled=True, dtype=dtype) for n in (2, 3, 4) for dtype in HALF_TYPES),
    *(Sum(parts=(BIT,) * 2, each_scaled=True, dtype=dtype) for dtype in HALF_TYPES),
    *(Sum(parts=NESTED[:n], dtype=dtype) for n in (1, 2, 3) for dtype in HALF_TYPES),
    *(Sum(parts=TWICE_ROUNDED, dtype=dtype) for dtype in HALF_TYPES),
    # Two tiles in one step, halves of tiles, a step over several groups of the row, the whole row.
    Sum(parts=(PLANE,) * 3, each_scaled=True, group_size=128, in_features=256, bias=True),
    Sum(parts=TWICE_ROUNDED, group_size=32, in_features=96, dtype=torch.bfloat16),
    Sum(parts=(PLANE,) * 2, each_scaled=True, group_size=16, in_features=80, out_features=9),
    Sum(parts=NESTED, group_size=None, in_features=192, rows=9, dtype=torch.bfloat16, bias=True),
    Sum(parts=(PLANE,) * 4, each_scaled=True, group_size=None, in_features=97, out_features=13, rows=17),
    Sum(parts=(BIT,) * 2, each_scaled=True, group_size=None, in_features=1, out_features=1, rows=1),
    Sum(parts=NESTED, out_features=8, in_features=64, rows=64),
    Sum(parts=TWICE_ROUNDED, rows=0),
    Sum(parts=(PLANE,) * 3, each_scaled=True, dtype=torch.float32, bias=True),
    Sum(parts=NESTED, dtype=torch.float32, rows=40),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_of_parts(case: Sum) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, dense, greatest = draw_weight(case, generator)
    x, bias = draw_rows(case, generator)
    y = parted_linear(x, weight, bias)
    expected = x.double() @ dense.t() + (0 if bias is None else bias.double())
    # As in ``products``: twice the longest chain of additions, of terms of |x| times the greatest floats.
    chain = 2 * (128 + case.in_features // 16 + 16 + len(case.parts))
    bound = chain * 2.0**-24 * (x.double().abs() @ greatest.t()) + ROUNDING[case.dtype] * expected.abs()
    assert y.dtype == case.dtype and y.shape == expected.shape
    assert bool(((y.double() - expected).abs() <= bound).all())


def test_the_first_parts_are_a_weight_by_themselves() -> None:
    """Reading at a lower width reads none of the other parts' words."""
    weight, _, _ = draw_weight(Sum(parts=NESTED), torch.Generator().manual_seed(0))
    first, _, _ = draw_weight(Sum(parts=NESTED[:1]), torch.Generator().manual_seed(0))
    assert torch.equal(weight.words[: len(first.words)], first.words)
    assert (weight.bits, first.bits) == (8, 4)
    assert weight.words.numel() == 2 * first.words.numel()


def test_a_weight_of_parts_takes_as_many_bytes_as_their_bits() -> None:
    weight, _, _ = draw_weight(
        Sum(parts=(PLANE,) * 3, each_scaled=True, in_features=256), torch.Generator().manual_seed(0)
    )
    # 72 rows of 256 weights at 3 bits, and three float16 scales for each group of 64.
    assert weight.read_bytes == 72 * 256 * 3 // 8 + 72 * 4 * 3 * 2


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    "case",
    [
        Sum(parts=(PLANE,) * 3, each_scaled=True, out_features=77, group_size=32, in_features=96),
        Sum(parts=NESTED, out_features=77, group_size=16, in_features=96),
        Sum(parts=TWICE_ROUNDED, out_features=9, group_size=None, in_features=97),
    ],
    ids=str,
)
def test_dequantized_parts_are_their_sum_rounded_once(case: Sum, dtype: torch.dtype) -> None:
    weight, dense, _ = draw_weight(case, torch.Generator().manual_seed(0))
    # Scales of two binades and codes of 8 bits: sums of 24 bits, exact in float32.
    assert torch.equal(dequantize_parts(weight, dtype), dense.float().to(dtype))
    assert torch.equal(dequantize_parts(weight, dtype, (8, case.out_features)), dense[8:].float().to(dtype))


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=["fp16", "bf16"])
def test_many_rows_multiply_the_reference_weight(dtype: torch.dtype) -> None:
    case = Sum(parts=NESTED, rows=70, dtype=dtype, bias=True)
    generator = torch.Generator().manual_seed(0)
    weight, dense, _ = draw_weight(case, generator)
    x, bias = draw_rows(case, generator)
    expected = torch.nn.functional.linear(x, dense.float().to(dtype), bias)
    assert torch.equal(parted_linear(x, weight, bias), expected)


def test_split_products_are_the_same_every_time() -> None:
    case = Sum(parts=(PLANE,) * 2, each_scaled=True, in_features=4096, group_size=128, rows=1)
    generator = torch.Generator().manual_seed(0)
    weight, dense, greatest = draw_weight(case, generator)
    x, _ = draw_rows(case, generator)
    y = parted_linear(x, weight)
    expected = x.double() @ dense.t()
    bound = 2 * 432 * 2.0**-24 * (x.double().abs() @ greatest.t()) + 2.0**-11 * expected.abs()
    assert bool(((y.double() - expected).abs() <= bound).all())
    assert torch.equal(parted_linear(x, weight), y)


def test_compiles_as_one_operation() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, _, _ = draw_weight(Sum(parts=NESTED), generator)
    x, _ = draw_rows(Sum(parts=NESTED), generator)
    fields = ([4, 2, 2], [7.5, 1.5, 1.5], [16.0, 4.0, 1.0], False, 64, 72)
    arguments = (x, weight.words, weight.scale, None, *fields)
    found = torch.library.opcheck(parted_linear_op, arguments, test_utils=("test_schema", "test_faketensor"))
    assert set(found.values()) == {"SUCCESS"}
    compiled = torch.compile(lambda x: parted_linear(x, weight) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), parted_linear(x, weight) * 2)
