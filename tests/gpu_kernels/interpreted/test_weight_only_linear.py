"""The weight-only product in Triton's interpreter against float64: every width, type and class of shape."""

import itertools
from dataclasses import replace

import pytest
import torch

from runtime.kernels.triton.devices import DEVICES
from runtime.kernels.triton.launch_table import LaunchKey, find_bucket, find_launch
from runtime.kernels.triton.weight_only_linear import dequantize_fragments, triton_linear, weight_only_linear
from tests.gpu_kernels.interpreted.products import Case, draw_product

HALF_TYPES = (torch.float16, torch.bfloat16)
EVERY_WIDTH = [Case(bits=bits, dtype=dtype) for bits, dtype in itertools.product(range(1, 9), HALF_TYPES)]
EVERY_GROUP = [
    Case(bits=bits, group_size=group_size, in_features=256, dtype=dtype, symmetric=symmetric)
    for bits, group_size, dtype, symmetric in [
        (2, 32, torch.float16, False),
        (5, 32, torch.bfloat16, True),
        (8, 32, torch.bfloat16, False),
        (3, 128, torch.float16, True),
        (6, 128, torch.bfloat16, False),
        (8, 128, torch.bfloat16, True),
        (1, 256, torch.bfloat16, False),
        (1, 64, torch.float16, True),
        (7, 256, torch.float16, True),
        (4, None, torch.bfloat16, True),
        (8, None, torch.float16, False),
    ]
]
AWKWARD = [
    Case(bits=4, rows=1, out_features=1, in_features=1, group_size=None),
    Case(bits=3, rows=17, out_features=13, in_features=97, group_size=None, dtype=torch.bfloat16, bias=True),
    Case(bits=4, rows=1, out_features=192, in_features=576, bias=True),
    Case(bits=2, rows=9, out_features=131, in_features=192, group_size=32),
    Case(bits=4, rows=2, out_features=9, in_features=96, group_size=32),
    Case(bits=5, rows=16, out_features=64, in_features=192, dtype=torch.bfloat16),
    Case(bits=4, rows=33, out_features=70, in_features=128, group_size=128, bias=True),
    Case(bits=6, rows=64, out_features=8, in_features=64),
    Case(bits=4, rows=0, out_features=8, in_features=64),
]
FLOAT32 = [Case(bits=bits, dtype=torch.float32, bias=True) for bits in (2, 3, 8)]
FLOAT32 += [Case(bits=4, dtype=torch.float32, rows=40)]


@pytest.mark.parametrize("case", [*EVERY_WIDTH, *EVERY_GROUP, *AWKWARD, *FLOAT32], ids=str)
def test_product(case: Case) -> None:
    product = draw_product(case)
    y = triton_linear(product.x, product.weight, product.bias)
    assert y.dtype == case.dtype
    assert y.shape == product.y.shape
    assert bool(((y.double() - product.y).abs() <= product.bound).all())


def test_split_products_are_the_same_every_time() -> None:
    case = Case(bits=4, rows=2, in_features=4096, group_size=128, bias=True)
    key = LaunchKey(
        architecture=80,
        bits=4,
        rows=find_bucket(case.rows),
        out_features=case.out_features,
        in_features=case.in_features,
        group_size=case.group_size,
    )
    assert find_launch(key, DEVICES["a100"]).splits > 1
    product = draw_product(case)
    first = triton_linear(product.x, product.weight, product.bias)
    assert bool(((first.double() - product.y).abs() <= product.bound).all())
    assert torch.equal(triton_linear(product.x, product.weight, product.bias), first)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=["fp16", "bf16"])
def test_dequantized_weight_is_the_reference_rounded_once(bits: int, dtype: torch.dtype) -> None:
    case = Case(bits=bits, out_features=77, in_features=96, group_size=32, symmetric=bits in (1, 4, 6))
    product = draw_product(case)
    # A code less its zero point, times a float16 scale, is exact in float32.
    assert torch.equal(dequantize_fragments(product.weight, dtype), product.dense.float().to(dtype))
    assert torch.equal(dequantize_fragments(product.weight, dtype, (8, 41)), product.dense[8:41].float().to(dtype))


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=["fp16", "bf16"])
def test_many_rows_multiply_the_reference_weight(dtype: torch.dtype) -> None:
    product = draw_product(Case(bits=5, rows=70, dtype=dtype, bias=True))
    dense = product.dense.float().to(dtype)
    expected = torch.nn.functional.linear(product.x, dense, product.bias)
    assert torch.equal(triton_linear(product.x, product.weight, product.bias), expected)


def test_leading_dimensions_and_strides_do_not_matter() -> None:
    case = Case(bits=4, rows=6)
    product = draw_product(case)
    expected = triton_linear(product.x, product.weight)
    assert torch.equal(triton_linear(product.x.view(2, 3, -1), product.weight), expected.view(2, 3, -1))
    strided = torch.stack([product.x, product.x + 1], dim=2)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(triton_linear(strided, product.weight), expected)


def test_float32_rows_of_any_size() -> None:
    """Rows are scaled by powers of two each, so the greatest and the least float32 are multiplied alike."""
    case = Case(bits=4, dtype=torch.float32, rows=1)
    product = draw_product(case)
    for scale in (2.0**-100, 2.0**80, 0.0):
        y = triton_linear(product.x * scale, product.weight)
        assert torch.equal(y, triton_linear(product.x, product.weight) * scale)


def test_compiles_as_one_operation() -> None:
    product = draw_product(Case(bits=4, bias=True))
    weight = product.weight
    arguments = (product.x, weight.words, weight.scale, weight.zero_point, product.bias, 4, 64, 72)
    found = torch.library.opcheck(weight_only_linear, arguments, test_utils=("test_schema", "test_faketensor"))
    assert set(found.values()) == {"SUCCESS"}
    compiled = torch.compile(lambda x: triton_linear(x, weight) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(product.x), triton_linear(product.x, weight) * 2)


def test_every_bit_of_a_product_depends_on_its_inputs() -> None:
    """The test of the bound: a code that is off by one is outside it."""
    product = draw_product(Case(bits=4, dtype=torch.float32, rows=1, in_features=64))
    words = product.weight.words.clone()
    words[0, 0, 0, 0, 0] ^= 1
    y = triton_linear(product.x, replace(product.weight, words=words))
    assert bool(((y.double() - product.y).abs() > product.bound).any())
