"""Half-quadratic grids: one iteration in float64, never worse than round-to-nearest in their own norm."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.formats import FORMATS
from runtime.quantization import dequantize
from runtime.quantizers.grid import find_grid
from runtime.quantizers.hqq import find_half_quadratic_grid, quantize_hqq
from runtime.quantizers.rtn import quantize_rtn
from tests.runtime.quantizers.cases import Array, draw_weight, to_float64

POWER = 0.7


def norm(difference: Array) -> Array:
    total: Array = (np.abs(difference) ** POWER).sum(-1)
    return total


def weight_with_tails(rows: int, in_features: int, seed: int) -> torch.Tensor:
    """Returns cubes of normal weights."""
    return draw_weight(rows, in_features, seed) ** 3


@pytest.mark.parametrize("name", ["int2_channel", "int3_channel_sym"])
@pytest.mark.parametrize("seed", range(5))
def test_one_iteration_agrees_with_float64(name: str, seed: int) -> None:
    format_, weight = FORMATS[name], weight_with_tails(1, 64, seed)
    grid, w = find_grid(weight, format_), to_float64(weight)
    first, zero, top = float(grid.scale), float(grid.zero_point), (1 << format_.bits) - 1
    codes = np.clip(np.rint(w / first + zero), 0, top)
    x = (w - first * (codes - zero)) / first
    target = w - first * np.sign(x) * np.maximum(np.abs(x) - np.abs(x) ** (POWER - 1) / 10.0, 0)
    moved = zero if format_.symmetric else float(np.rint(np.clip((codes - target / first).mean(), 0, top)))
    scale = float(np.float16((target * (codes - moved)).sum() / ((codes - moved) ** 2).sum()))
    rendered = scale * (np.clip(np.rint(w / scale + moved), 0, top) - moved)
    # The better of round-to-nearest and the one iterate.
    improved = norm(rendered - w) < norm(first * (codes - zero) - w)
    found_scale, found_zero = find_half_quadratic_grid(weight, format_, iterations=1)
    expected = (scale, moved) if improved[0] else (first, zero)
    # float32 sums may round to the next float16.
    assert (float(found_scale), float(found_zero)) == pytest.approx(expected, rel=2.0**-10)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(["int2_g32", "int3_g32_sym", "int4_channel"]),
    exponent=st.integers(-6, 3),
    seed=st.integers(0, 2**31),
)
def test_round_to_nearest_is_never_better(name: str, exponent: int, seed: int) -> None:
    weight = weight_with_tails(3, 64, seed) * 10.0**exponent
    found, nearest = quantize_hqq(weight, FORMATS[name]), quantize_rtn(weight, FORMATS[name])
    shape = (*nearest.scale.shape, -1)
    w = to_float64(weight)
    now = norm((to_float64(dequantize(found)) - w).reshape(shape))
    before = norm((to_float64(dequantize(nearest)) - w).reshape(shape))
    # A weight next to its code leaves an error of a few roundings, 2^-24 of itself, whose power 0.7 is 1e-5 of its own.
    allowance = norm((w * 2.0**-22).reshape(shape))
    assert (now <= before + allowance).all()


def test_tails_gain() -> None:
    weight = weight_with_tails(40, 64, 0)
    found, nearest = (q(weight, FORMATS["int2_g64"]) for q in (quantize_hqq, quantize_rtn))
    now, before = (norm(to_float64(dequantize(q) - weight)).sum() for q in (found, nearest))
    assert now < 0.95 * before


def test_rounding_the_zero_point_changes_little() -> None:
    weight = weight_with_tails(40, 64, 0)

    def error_of(round_zero_point: bool) -> float:
        scale, zero = find_half_quadratic_grid(weight, FORMATS["int2_g64"], round_zero_point=round_zero_point)
        assert bool((zero == zero.round()).all()) == round_zero_point
        codes = torch.round(weight / scale + zero).clamp(0, 3)
        return float(norm(to_float64(scale * (codes - zero) - weight)).sum())

    assert error_of(True) == pytest.approx(error_of(False), rel=0.05)


def test_sizes_of_weights_do_not_matter() -> None:
    weight = weight_with_tails(4, 64, 1)
    found, doubled = quantize_hqq(weight, FORMATS["int3_g32"]), quantize_hqq(8 * weight, FORMATS["int3_g32"])
    assert torch.equal(dequantize(doubled), 8 * dequantize(found))


@pytest.mark.parametrize("wrong", [{"norm_power": 0.0}, {"norm_power": 1.5}, {"iterations": 0}, {"beta": 0.0}], ids=str)
def test_arguments_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=rf"norm_power must be in \(0, 1\].*{name}={value}"):
        quantize_hqq(draw_weight(1, 32), FORMATS["int2_g32"], **wrong)  # type: ignore[arg-type]
