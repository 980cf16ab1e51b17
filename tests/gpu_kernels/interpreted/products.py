"""Random packed weights, their products in float64, and how far a kernel may be from them.

The bound is that of accumulated rounding. A group's sum runs over code floats of up to c = (BASE + STEP (2**b - 1)) /
STEP steps, so the terms that float32 rounds are |x| s (c + c): once in the product, once in what is subtracted. The
longest chain of additions is a step of 128, the groups, and the splits. The result is rounded to its type once; the
interpreter truncates to bfloat16, a whole unit in the last place.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.kernels.triton.fragment_layout import TWO_VALUES, FragmentWeight, pack_fragments
from runtime.kernels.triton.packed_fragments import find_fragments
from runtime.packed import PackedWeight

MANTISSA_BITS = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 10}
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A product: y [rows, out_features] = x W' + bias."""

    bits: int
    dtype: torch.dtype = torch.float16
    rows: int = 3
    out_features: int = 72
    in_features: int = 128
    group_size: int | None = 64
    symmetric: bool = False
    bias: bool = False

    def __str__(self) -> str:
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        flags = ("-sym" if self.symmetric else "") + ("-bias" if self.bias else "")
        shape = f"{self.rows}x{self.out_features}x{self.in_features}"
        return f"W{self.bits}-{str(self.dtype).removeprefix('torch.')}-{shape}-{group}{flags}"


@dataclass(frozen=True, kw_only=True)
class Product:
    """The inputs of a case, and its result and greatest error in float64."""

    x: Tensor
    weight: FragmentWeight
    bias: Tensor | None
    dense: Tensor
    y: Tensor
    bound: Tensor


def draw_weight(case: Case, generator: torch.Generator) -> tuple[FragmentWeight, Tensor, Tensor]:
    """Returns a packed weight, and the weight and the scale of each element [out_features, in_features] in float64."""
    rows, count = case.out_features, case.in_features
    groups = 1 if case.group_size is None else count // case.group_size
    codes = torch.randint(0, 1 << case.bits, (rows, count), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) * 0.02 + 1e-3).to(torch.float16)
    zero = None
    if not case.symmetric:
        zero = torch.randint(0, 1 << case.bits, (rows, groups), dtype=torch.uint8, generator=generator)
    weight = pack_fragments(codes, scale, zero, bits=case.bits, group_size=case.group_size)
    middle = 0.5 if case.bits == 1 else 2.0 ** (case.bits - 1)
    shift = torch.full((rows, groups), middle) if zero is None else zero
    each = scale.double().repeat_interleave(count // groups, dim=1)
    dense = each * (codes.double() - shift.double().repeat_interleave(count // groups, dim=1))
    return weight, dense, each


def draw_product(case: Case, seed: int = 0) -> Product:
    """Returns a case with activations that hold an outlier channel, as those of language models do."""
    generator = torch.Generator().manual_seed(seed)
    weight, dense, scale = draw_weight(case, generator)
    x = torch.randn(case.rows, case.in_features, generator=generator)
    x[:, case.in_features // 3] *= 20
    x = x.to(case.dtype)
    bias = torch.randn(case.out_features, generator=generator).to(case.dtype) if case.bias else None
    y = x.double() @ dense.t()
    y = y if bias is None else y + bias.double()
    return Product(x=x, weight=weight, bias=bias, dense=dense, y=y, bound=bound_error(case, x, scale, y))


def bound_error(case: Case, x: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """Returns the greatest error of each element of y (see the head of this file)."""
    chain = 128 + case.in_features // 32 + 16
    rounding = 2 * chain * 2.0**-24 * find_greatest_code(case.bits, case.dtype) * (x.double().abs() @ scale.t())
    return rounding + ROUNDING[case.dtype] * y.abs()


def find_greatest_code(bits: int, dtype: torch.dtype) -> float:
    """Returns the greatest of the floats that stand for codes, in steps, for activations of a type."""
    # Activations of types that do not hold 8 bits are float16 where codes have as many; what that loses of the greatest
    # element of a row, 2**-35 or less, is not worth a term of its own beside 2**-24.
    mantissa = 10 if bits == 8 else MANTISSA_BITS[dtype]
    # The highest place of a whole code in the mantissa.
    start = max(i for i in range(0, 16, bits) if i + bits <= mantissa)
    return 2.0 ** (mantissa - start) + 2**bits


def bound_sums(x: Tensor, weight: PackedWeight) -> Tensor:
    """Returns what float32 rounds of sums of the floats that stand for codes, twice, in chains of 128 and the groups.

    Of floats the weights themselves are summed.

    Args:
        x: [..., in_features].
        weight: A packed weight of one factor.

    Returns:
        [..., out_features].
    """
    fragments = find_fragments(weight)
    assert fragments is not None
    step = fragments.factor * fragments.scale.to(torch.float64).abs().amax(0)
    if fragments.scale_name == TWO_VALUES:
        assert fragments.zero_point is not None
        step += fragments.zero_point.abs().amax(0)
    codes = find_greatest_code(fragments.bits, x.dtype) * step[: weight.shape[0]]
    greatest = codes if fragments.element < 0 else weight().double().abs().amax(1)
    return 2 * 132 * 2.0**-24 * greatest * x.abs().double().sum(-1, keepdim=True) * 2
