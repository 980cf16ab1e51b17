"""Rows as float16 numbers and powers of two: exact where they say so, and near enough where not."""

import pytest
import torch
from torch import Tensor

from runtime.kernels.triton.row_scaling import needs_scaled_rows, scale_rows, sum_parts


def draw_rows(rows: int, count: int, dtype: torch.dtype) -> Tensor:
    """Returns rows of very different sizes, each with elements over 60 binades."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, count, generator=generator)
    x = torch.ldexp(x, torch.randint(-60, 1, (rows, count), generator=generator))
    return torch.ldexp(x, torch.linspace(-60, 120, rows).int()[:, None]).to(dtype)


def rebuild(x: Tensor) -> Tensor:
    """Returns in float64 what the scaled rows of x stand for."""
    scaled = scale_rows(x)
    assert scaled.values.dtype == torch.float16
    assert not scaled.values[..., x.shape[1] :].any(), "padded with zeros"
    assert bool((scaled.exponent == scaled.exponent[:1]).all())
    return torch.ldexp(sum_parts(scaled.values.double()), scaled.exponent[0, :, None])[:, : x.shape[1]]


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (7, 97), (3, 1024), (2, 1100)])
def test_bfloat16_keeps_all_bits_of_elements_that_matter(rows: int, count: int) -> None:
    x = draw_rows(rows, count, torch.bfloat16)
    found, greatest = rebuild(x), x.double().abs().amax(dim=1, keepdim=True)
    kept = x.double().abs() >= 2.0**-30 * greatest
    assert torch.equal(found[kept], x.double()[kept])
    assert bool(((found - x.double()).abs() <= 2.0**-38 * greatest).all())
    assert scale_rows(x).values.shape == (1, rows, -(-count // 64) * 64)


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (7, 97), (2, 1100)])
def test_float32_keeps_22_bits(rows: int, count: int) -> None:
    x = draw_rows(rows, count, torch.float32)
    greatest = x.double().abs().amax(dim=1, keepdim=True)
    assert bool(((rebuild(x) - x.double()).abs() <= 2.0**-22 * x.double().abs() + 2.0**-35 * greatest).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_greatest_and_the_least_rows_there_are(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    x = torch.tensor([[limits.max, limits.max / 3], [limits.tiny, limits.tiny * 4], [0, 0], [torch.inf, 1]]).to(dtype)
    found = rebuild(x)
    assert torch.equal(found[1:3], x[1:3].double())
    assert bool(((found[0] - x[0].double()).abs() <= 2.0**-22 * x[0].double()).all())
    assert found[3, 0] == torch.inf or torch.isnan(found[3, 0])
    # Elements without a place in float16 would be infinite or zero.
    assert bool(scale_rows(x).values[0, :2, :2].isfinite().all())
    assert bool((scale_rows(x).values[0, :2, :2] > 0).all())


def test_strides_do_not_matter() -> None:
    x = draw_rows(4, 130, torch.bfloat16)
    expected = scale_rows(x)
    assert torch.equal(scale_rows(x.t().contiguous().t()).values, expected.values)
    wide = torch.cat([x, x + 1], dim=1)[:, :130]
    assert wide.stride(0) == 260
    assert torch.equal(scale_rows(wide).values, expected.values)


def test_no_rows_make_no_launch() -> None:
    assert scale_rows(torch.empty(0, 5)).values.shape == (2, 0, 64)


def test_which_products_need_them() -> None:
    assert [needs_scaled_rows(torch.bfloat16, bits) for bits in (4, 7, 8)] == [False, False, True]
    assert not needs_scaled_rows(torch.float16, 8)
    assert needs_scaled_rows(torch.float32, 2)
