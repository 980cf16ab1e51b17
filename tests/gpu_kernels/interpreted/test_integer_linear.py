"""Products of integer activations in Triton's interpreter: integers are equal, what is scaled is within rounding."""

import itertools
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

from runtime.activation_formats import ACTIVATION_FORMATS, ActivationFormat, ActivationRounding, round_to_integers
from runtime.apply import apply_formats_, pack_weight
from runtime.formats import FORMATS
from runtime.kernels.dispatch import kernel_path
from runtime.kernels.reference import integer_linear_reference
from runtime.kernels.triton.fragment_layout import FragmentWeight, unpack_words, unpack_zeros
from runtime.kernels.triton.integer_linear import (
    IntegerRows,
    find_integer_launch,
    fits_integers,
    integer_linear,
    round_rows,
    triton_integer_linear,
)
from runtime.kernels.triton.packed_product import find_fragments, packed_integer_linear
from runtime.packed import QuantizedLinear
from runtime.simulated_activations import simulated_activations
from runtime.units import list_weights
from tests.gpu_kernels.interpreted.products import Case, draw_weight
from tests.tiny_models import build_tiny_llama

INT8 = {"reach": 127.5, "limit": 128}
EVERY_WIDTH = [
    Case(bits=bits, group_size=group_size, symmetric=symmetric)
    for bits, (group_size, symmetric) in itertools.product(range(1, 9), [(64, False), (32, True)])
]
EVERY_GROUP = [
    Case(bits=bits, group_size=group_size, symmetric=symmetric, in_features=256)
    for bits, group_size, symmetric in [
        (1, 128, True),
        (1, 64, True),
        (2, 32, False),
        (2, 256, False),
        (3, 128, False),
        (4, 128, True),
        (4, 32, False),
        (4, None, False),
        (8, None, True),
        (8, 128, True),
    ]
]
AWKWARD = [
    Case(bits=4, rows=1, out_features=1, in_features=1, group_size=None),
    Case(bits=3, rows=17, out_features=13, in_features=97, group_size=None),
    Case(bits=4, rows=1, out_features=192, in_features=576, bias=True),
    Case(bits=8, rows=9, out_features=131, in_features=192, group_size=32, bias=True),
    Case(bits=4, rows=2, out_features=9, in_features=96, group_size=32),
    Case(bits=5, rows=67, out_features=70, in_features=64),
    Case(bits=4, rows=0, out_features=8, in_features=64),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expect(integers: Tensor, scale: Tensor, weight: FragmentWeight) -> Tensor:
    """Returns the reference's product with a weight in the kernels' layout, in float64."""
    out_features, in_features = weight.shape
    groups = 1 if weight.group_size is None else in_features // weight.group_size
    codes = unpack_words(weight.words, weight.bits, weight.shape).long()
    steps = weight.scale.double()[:groups, :out_features].t()
    if weight.zero_point is not None:
        zero = unpack_zeros(weight.zero_point, weight.bits, out_features)[:groups].t().long()
    elif weight.bits == 1:
        codes, steps, zero = 2 * codes, steps / 2, torch.ones_like(steps)
    else:
        zero = torch.full_like(steps, 2 ** (weight.bits - 1))
    return weight.factor * integer_linear_reference(integers, scale, codes, steps, zero)


@pytest.mark.parametrize("case", [*EVERY_WIDTH, *EVERY_GROUP, *AWKWARD], ids=str)
def test_integers_are_multiplied_exactly(case: Case) -> None:
    """With scales that are powers of two nothing is rounded, so the product is the reference's, bit for bit."""
    generator = torch.Generator().manual_seed(case.bits)
    weight, _, _ = draw_weight(case, generator)
    weight = replace(weight, scale=torch.ldexp(torch.ones_like(weight.scale), weight.scale.frexp().exponent + 4))
    integers = torch.randint(-128, 128, (case.rows, case.in_features), generator=generator)
    integers[:, ::5] = -128
    scale = torch.ldexp(torch.ones(case.rows), torch.arange(case.rows) % 7 - 3)
    bias = torch.randint(-9, 9, (case.out_features,), generator=generator).float() if case.bias else None
    expected = expect(integers, scale, weight)
    # Below 2**24 of the least scale, or of its half for one bit of two opposite values: float32 is exact.
    least = float(weight.scale[weight.scale > 0].min()) / 2 if case.rows else 1.0
    assert not case.rows or float((expected / scale[:, None]).abs().max()) / least < 2**24
    y = triton_integer_linear(integers.float() * scale[:, None], weight, bias, scale, **INT8)
    assert torch.equal(y.double(), expected if bias is None else expected + bias.double())


@pytest.mark.parametrize(
    "case",
    [
        Case(bits=4, dtype=torch.float16, bias=True),
        Case(bits=8, dtype=torch.bfloat16, group_size=128, symmetric=True),
        Case(bits=3, dtype=torch.float32, in_features=576, bias=True),
        Case(bits=6, dtype=torch.bfloat16, in_features=1024, group_size=None),
    ],
    ids=str,
)
def test_product_is_within_rounding(case: Case) -> None:
    weight, _, each = draw_weight(case, torch.Generator().manual_seed(1))
    x = draw(case.rows, case.in_features)
    x[:, case.in_features // 3] *= 20
    x = x.to(case.dtype)
    bias = draw(case.out_features).to(case.dtype) if case.bias else None
    format_ = cast(ActivationFormat, ACTIVATION_FORMATS["int8_token"])
    scale = x.float().abs().amax(dim=1) / format_.reach
    integers = round_to_integers(x.float(), format_, scale[:, None])
    expected = expect(integers, scale, weight)
    expected = expected if bias is None else expected + bias.double()
    y = triton_integer_linear(x, weight, bias, None, **INT8)
    assert y.dtype == case.dtype
    # Each group's sum, its scale, the addition of groups and splits and the row's scale round once each; terms are up
    # to 2**bits steps. The result is rounded to its type, the interpreter truncates to bfloat16.
    chain = case.in_features // 32 + 16
    terms = scale.double()[:, None] * (integers.double().abs() @ each.t()) * 2**case.bits
    rounding = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-24}[case.dtype]
    bound = chain * 2.0**-24 * terms + 2 * rounding * expected.abs()
    assert bool(((y.double() - expected).abs() <= bound).all())


def test_split_products_are_the_same_every_time() -> None:
    case = Case(bits=4, rows=2, in_features=4096, group_size=128)
    weight, _, _ = draw_weight(case, torch.Generator().manual_seed(0))
    assert find_integer_launch(weight, case.rows).splits > 1
    assert find_integer_launch(weight, 1000).splits == 1
    x, bias = draw(case.rows, case.in_features), draw(case.out_features)
    first = triton_integer_linear(x, weight, bias, None, **INT8)
    assert torch.equal(triton_integer_linear(x, weight, bias, None, **INT8), first)
    assert torch.allclose(first - bias, triton_integer_linear(x, weight, None, None, **INT8), atol=1e-4)


def in_order(rows: IntegerRows, quad_step: int, count: int) -> Tensor:
    """Returns integers in the order of the activations (the formula of ``integer_unpacking``)."""
    high, low = (step for step in (32, 16, 8) if step != quad_step)
    place = torch.arange(rows.values.shape[1])
    s, u, q, second, e = (place >> 5) & 1, (place >> 4) & 1, (place >> 2) & 3, (place >> 1) & 1, place & 1
    source = place // 64 * 64 + quad_step * e + high * s + low * u + 2 * q + second
    assert torch.equal(source.sort().values, place)
    plain = torch.empty_like(rows.values)
    plain[:, source] = rows.values
    assert not plain[:, count:].any(), "padded with zeros"
    return plain[:, :count]


@pytest.mark.parametrize("quad_step", [8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
def test_rows_are_rounded_as_their_format_says(dtype: torch.dtype, quad_step: int) -> None:
    for name, (rows, count) in itertools.product(("int8_token", "int4_token"), ((1, 1), (5, 97), (2, 1100))):
        format_ = cast(ActivationFormat, ACTIVATION_FORMATS[name])
        x = (draw(rows, count) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
        x[0, 0] = 0.5 * x[0].abs().max()  # a tie of 8 bits, or near one
        scale = x.float().abs().amax(dim=1) / format_.reach
        found = round_rows(x, None, reach=format_.reach, limit=format_.limit, quad_step=quad_step)
        assert torch.equal(found.scale, scale.clamp(min=torch.finfo(torch.float32).tiny))
        expected = round_to_integers(x.float(), format_, found.scale[:, None])
        assert torch.equal(in_order(found, quad_step, count).float(), expected)


def test_given_scales_clip_and_ties_go_to_even() -> None:
    x = torch.tensor(
        [[0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, torch.inf], [127.4, 127.5, 126.5, -128.5, -127.5, 0, 0, 0]]
    )
    found = round_rows(x, torch.ones(2), reach=127.5, limit=128, quad_step=8)
    assert in_order(found, 8, 8).tolist() == [[0, 2, 2, 0, -2, 127, -128, 127], [127, 127, 126, -128, -128, 0, 0, 0]]


def test_rows_of_zeros_and_rows_without_numbers() -> None:
    weight, _, _ = draw_weight(Case(bits=4, group_size=64), torch.Generator().manual_seed(0))
    x = draw(4, 128)
    x[0], x[1, 3], x[2, 5] = 0, torch.nan, torch.inf
    y = triton_integer_linear(x, weight, None, None, **INT8)
    assert not y[0].any()
    assert not y[1:3].isfinite().any()
    assert bool(y[3].isfinite().all())
    assert not triton_integer_linear(x, weight, None, torch.ones(4), **INT8)[1].isfinite().any()


def test_a_code_that_is_off_by_one_is_seen() -> None:
    weight, _, _ = draw_weight(Case(bits=4, in_features=64), torch.Generator().manual_seed(0))
    words = weight.words.clone()
    words[0, 0, 0, 0, 0] ^= 1
    x = torch.ones(1, 64)
    y = triton_integer_linear(x, weight, None, torch.ones(1), **INT8)
    assert not torch.equal(triton_integer_linear(x, replace(weight, words=words), None, torch.ones(1), **INT8), y)


def test_strides_and_leading_dimensions_do_not_matter() -> None:
    weight, _, _ = draw_weight(Case(bits=4), torch.Generator().manual_seed(0))
    x = draw(6, 128)
    expected = triton_integer_linear(x, weight, None, None, **INT8)
    assert torch.equal(triton_integer_linear(x.view(2, 3, -1), weight, None, None, **INT8), expected.view(2, 3, -1))
    strided = torch.stack([x, x + 1], dim=2)[..., 0]
    assert torch.equal(triton_integer_linear(strided, weight, None, None, **INT8), expected)


def test_compiles_as_one_operation() -> None:
    weight, _, _ = draw_weight(Case(bits=4), torch.Generator().manual_seed(0))
    x = draw(3, 128)
    arguments = (x, weight.words, weight.scale, weight.zero_point, None, None, 4, 64, 72, 1.0, 127.5, 128)
    found = torch.library.opcheck(integer_linear, arguments, test_utils=("test_schema", "test_faketensor"))
    assert set(found.values()) == {"SUCCESS"}


def test_which_weights_fit() -> None:
    weight, _, _ = draw_weight(Case(bits=4, in_features=32, group_size=16), torch.Generator().manual_seed(0))
    assert not fits_integers(weight)
    assert fits_integers(replace(weight, group_size=32))
    assert not fits_integers(replace(weight, group_size=32, element=1))
    # Sums of 2**17 integers of 8 bits times codes of 8 bits would not fit 32 bits.
    assert not fits_integers(replace(weight, group_size=None, shape=(8, 2**17)))
    assert fits_integers(replace(weight, group_size=128, shape=(8, 2**17)))


INTEGER_ACTIVATIONS = [("int8_token", None), ("int4_token", None), ("int8_tensor", None), ("int8_tensor_static", 0.02)]
WEIGHTS = ("int4_g64", "int8_channel_sym", "int3_g32", "mxint8", "int1_g64_sym_pow2")


@pytest.mark.parametrize(("name", "scale"), INTEGER_ACTIVATIONS)
@pytest.mark.parametrize("weight_format", WEIGHTS)
def test_packed_layers_multiply_the_integers_of_their_plan(name: str, scale: float | None, weight_format: str) -> None:
    weight, x = pack_weight(draw(11, 128), FORMATS[weight_format]), draw(2, 3, 128, seed=1)
    rounding = ActivationRounding(
        format=ACTIVATION_FORMATS[name], scale=None if scale is None else torch.tensor([scale])
    )
    y = packed_integer_linear(x, weight, None, rounding)
    assert y is not None
    # What is rendered is s i rounded to float32, so the two differ by the rounding of terms alone.
    expected = rounding.render(x).double() @ weight().double().t()
    bound = 2.0**-20 * (rounding.render(x).double().abs() @ weight().double().abs().t()) * 16
    assert bool(((y.double() - expected).abs() <= bound).all())
    assert torch.equal(QuantizedLinear(weight)(x, rounding), y)


@pytest.mark.parametrize(
    ("name", "scale", "weight_format"),
    [
        ("fp8_token", None, "int4_g64"),
        ("int8_channel_static", [0.02] * 128, "int4_g64"),
        ("int8_token", None, "int4_g16"),
        ("int8_token", None, "mxfp4"),
        ("int8_token", None, "bf16"),
        ("bf16", None, "int4_g64"),
    ],
)
def test_other_layers_multiply_what_their_plan_renders(
    name: str, scale: list[float] | None, weight_format: str
) -> None:
    weight, x = pack_weight(draw(11, 128), FORMATS[weight_format]), draw(2, 3, 128, seed=1)
    rounding = ActivationRounding(format=ACTIVATION_FORMATS[name], scale=None if scale is None else torch.tensor(scale))
    assert packed_integer_linear(x, weight, None, rounding) is None
    linear = QuantizedLinear(weight)
    assert torch.equal(linear(x, rounding), linear(rounding.render(x)))


def test_a_model_with_activation_formats_uses_the_integers() -> None:
    model = build_tiny_llama().requires_grad_(False)
    names = {name: weight for name, weight in list_weights(model).items() if weight.kind == "linear"}
    apply_formats_(model, {name: "int8_g32" for name in names})
    scheme = {weight.parameter.removesuffix(".weight"): ("int8_token", None) for weight in names.values()}
    tokens = torch.arange(6).view(1, 6)
    with simulated_activations(model, scheme):
        logits = model(tokens).logits
        with kernel_path("reference"):
            expected = model(tokens).logits
    assert not torch.equal(logits, expected)
    assert float((logits - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    assert all(find_fragments(m.weight) for m in model.modules() if isinstance(m, QuantizedLinear))
    assert not torch.equal(model(tokens).logits, logits), "nothing is left behind"
