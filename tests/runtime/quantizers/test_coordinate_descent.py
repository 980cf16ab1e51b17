"""Coordinate descent: never up, at rest only where no single change helps, between the optimum and its start."""

from itertools import product

import numpy as np
import pytest
import torch

from runtime.formats import FORMATS
from runtime.quantization import QuantizedWeight, dequantize
from runtime.quantizers import InputStatistics
from runtime.quantizers.coordinate_descent import STARTS, quantize_coordinate_descent
from runtime.quantizers.gptq import quantize_gptq
from runtime.quantizers.grid import Grid, find_grid, grid_of
from runtime.quantizers.rtn import quantize_rtn
from tests.runtime.quantizers.cases import (
    Array,
    draw_statistics,
    draw_weight,
    errors_by_row,
    expand,
    to_float64,
)

START_OF = {"gptq": quantize_gptq, "rtn": quantize_rtn}
# Errors are compared in float32 by the code and in float64 here; in 96 columns roundings add up to 96 * 2^-24.
ROUNDING = 1e-5


def sweep_once(weight: torch.Tensor, H: Array, start: QuantizedWeight) -> Array:
    """Returns the codes after one sweep in float64, every column from the whole gradient."""
    scale, zero_point = expand(grid_of(start), weight.shape[1])
    codes, W = to_float64(start.codes), to_float64(weight)
    values = scale * (codes - zero_point)
    for j in range(weight.shape[1]):
        best = values[:, j] - (values - W) @ H[:, j] / H[j, j]
        codes[:, j] = np.rint(best / scale[:, j]) + zero_point[:, j]
        codes[:, j] = np.clip(codes[:, j], 0, (1 << start.format.bits) - 1)
        values[:, j] = scale[:, j] * (codes[:, j] - zero_point[:, j])
    return codes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("name", "rows", "in_features"), [("int2_g32", 6, 160), ("int4_channel_sym", 3, 61)])
def test_one_sweep_agrees_with_float64(name: str, rows: int, in_features: int, start: str, seed: int) -> None:
    weight, statistics = draw_weight(rows, in_features, seed), draw_statistics(in_features, seed=seed)
    found = quantize_coordinate_descent(
        weight, FORMATS[name], statistics, start=start, sweeps=1, relaxed_every=None, refit_scales=False
    )
    begun = START_OF[start](weight, FORMATS[name], statistics)
    assert np.array_equal(found.codes.numpy(), sweep_once(weight, to_float64(statistics.hessian()), begun))


def refit_once(weight: torch.Tensor, H: Array, start: QuantizedWeight, codes: Array) -> Array:
    """Returns the scales after one refit in float64, group by group."""
    scale, zero_point = expand(grid_of(start), weight.shape[1])
    length = weight.shape[1] // start.scale.shape[1]
    for first in range(0, weight.shape[1], length):
        block = slice(first, first + length)
        direction = (codes - zero_point)[:, block]
        slope = (((scale * (codes - zero_point) - to_float64(weight)) @ H)[:, block] * direction).sum(1)
        curvature = np.einsum("ri,ij,rj->r", direction, H[block, block], direction)
        scale[:, block] = (scale[:, first] - slope / curvature).astype(np.float16)[:, None]
    return scale[:, ::length]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["int4_g32", "int3_g32_sym", "int2_channel"])
def test_one_refit_agrees_with_float64(name: str, seed: int) -> None:
    weight, statistics = draw_weight(24, 64, seed), draw_statistics(64, seed=seed)
    begun, H = quantize_rtn(weight, FORMATS[name]), to_float64(statistics.hessian())
    found = quantize_coordinate_descent(
        weight, FORMATS[name], statistics, start="rtn", sweeps=1, relaxed_every=None, refit_scales=True
    )
    scale = refit_once(weight, H, begun, sweep_once(weight, H, begun))
    # A scale between two float16 numbers may go to either.
    np.testing.assert_allclose(to_float64(found.scale), scale, rtol=2.0**-10)
    assert (to_float64(found.scale) == scale).mean() > 0.95
    assert not torch.equal(found.scale, begun.scale)


@pytest.mark.parametrize("refit_scales", [False, True])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["int2_g32", "int3_g32_sym", "int4_channel"])
def test_no_sweep_raises_the_error_of_a_row(name: str, start: str, refit_scales: bool) -> None:
    weight, statistics = draw_weight(16, 96), draw_statistics(96)
    errors = errors_by_row(START_OF[start](weight, FORMATS[name], statistics), weight, statistics)
    begun = errors.sum()
    # GPTQ leaves little to gain where channels are few.
    part = 0.8 if start == "rtn" else 1.0
    for sweeps in range(1, 7):
        found = quantize_coordinate_descent(
            weight, FORMATS[name], statistics,
            start=start, sweeps=sweeps, relaxed_every=None, refit_scales=refit_scales,
        )  # fmt: skip
        now = errors_by_row(found, weight, statistics)
        assert (now <= errors * (1 + ROUNDING)).all()
        errors = now
    assert errors.sum() < part * begun


@pytest.mark.parametrize("refit_scales", [False, True])
@pytest.mark.parametrize("name", ["int2_g32", "int3_g32_sym"])
def test_at_rest_no_single_change_helps(name: str, refit_scales: bool) -> None:
    weight, statistics = draw_weight(3, 64), draw_statistics(64)
    found = quantize_coordinate_descent(
        weight, FORMATS[name], statistics, sweeps=500, relaxed_every=None, refit_scales=refit_scales
    )
    least = errors_by_row(found, weight, statistics) * (1 - ROUNDING)
    grid = grid_of(found)
    for j, code in product(range(64), range(1 << found.format.bits)):
        codes = found.codes.clone()
        codes[:, j] = code
        assert (errors_by_row(grid.quantized(codes), weight, statistics) >= least).all()
    if not refit_scales:
        return
    for g, step in product(range(grid.scale.shape[1]), (-1, 1)):
        scale = grid.scale.clone()
        # The float16 before and after.
        scale.view(torch.int16)[:, g] += step
        moved = Grid(format=found.format, scale=scale, zero_point=grid.zero_point)
        assert (errors_by_row(moved.quantized(found.codes), weight, statistics) >= least).all()


@pytest.mark.parametrize("seed", range(10))
def test_the_optimum_of_all_codes_is_a_lower_bound(seed: int) -> None:
    weight, statistics, format_ = draw_weight(1, 5, seed), draw_statistics(5, seed=seed), FORMATS["int2_channel"]
    grid = find_grid(weight, format_)
    everything = torch.tensor(list(product(range(4), repeat=5)), dtype=torch.uint8)
    values = grid.scale.float() * (everything.float() - grid.zero_point)
    difference = to_float64(values) - to_float64(weight)
    optimum = np.einsum("ri,ij,rj->r", difference, to_float64(statistics.hessian()), difference).min()

    def error_of(found: QuantizedWeight) -> float:
        assert torch.equal(found.scale, grid.scale)
        return float(errors_by_row(found, weight, statistics)[0])

    nearest = error_of(quantize_rtn(weight, format_))
    gptq = error_of(quantize_gptq(weight, format_, statistics, clip=False))
    for relaxed_every in (None, 3):
        descended = error_of(
            quantize_coordinate_descent(
                weight, format_, statistics, start="rtn", refit_scales=False, relaxed_every=relaxed_every
            )
        )
        assert optimum * (1 - ROUNDING) <= descended <= nearest * (1 + ROUNDING)
    assert optimum * (1 - ROUNDING) <= gptq


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["int2_g32", "int3_g64_sym", "int4_channel"])
def test_relaxed_sweeps_keep_the_best_of_every_row(name: str, start: str) -> None:
    weight, statistics = draw_weight(16, 192), draw_statistics(192)
    begun = errors_by_row(START_OF[start](weight, FORMATS[name], statistics), weight, statistics)
    found = errors_by_row(quantize_coordinate_descent(weight, FORMATS[name], statistics, start=start),
                          weight, statistics)  # fmt: skip
    assert (found <= begun * (1 + ROUNDING)).all()
    assert found.sum() < (0.8 if start == "rtn" else 1.0) * begun.sum()


def test_a_weight_on_its_grid_stays() -> None:
    weight = dequantize(quantize_rtn(draw_weight(4, 64), FORMATS["int3_g32"]))
    found = quantize_coordinate_descent(weight, FORMATS["int3_g32"], draw_statistics(64), start="rtn")
    assert torch.equal(dequantize(found), weight)


def test_equal_inputs_and_fixed_grids_leave_round_to_nearest() -> None:
    weight = draw_weight(4, 64)
    found = quantize_coordinate_descent(
        weight, FORMATS["int3_g32"], InputStatistics.isotropic(64), start="rtn", relaxed_every=None, refit_scales=False
    )
    assert torch.equal(dequantize(found), dequantize(quantize_rtn(weight, FORMATS["int3_g32"])))


@pytest.mark.parametrize("wrong", [{"start": "magic"}, {"sweeps": 0}, {"relaxed_every": 1}], ids=str)
def test_arguments_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    name, value = next(iter(wrong.items()))
    shown = f"{name}='{value}'" if isinstance(value, str) else f"{name}={value}"
    with pytest.raises(ValueError, match=rf"start must be one of gptq, rtn.*{shown}"):
        quantize_coordinate_descent(draw_weight(1, 32), FORMATS["int2_g32"], draw_statistics(32), **wrong)  # type: ignore[arg-type]
