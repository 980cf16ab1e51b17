"""GPTQ against its published form in float64: errors spread by the inverse Hessian, one column at a time."""

import numpy as np
import pytest
import torch

from runtime.formats import FORMATS
from runtime.quantization import dequantize
from runtime.quantizers import InputStatistics
from runtime.quantizers.clipping import find_clipped_grid, quantize_clipping
from runtime.quantizers.gptq import normalised_factor, quantize_gptq
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

CASES = [("int2_g32", 6, 96), ("int4_g64", 9, 192), ("int3_channel_sym", 3, 131), ("int3_g32_sym", 1, 64)]


def published_codes(weight: torch.Tensor, H: Array, order: Array, grid: Grid) -> Array:
    """Returns the codes of algorithm 1 on given grids: after each column the others take up its error."""
    W, order = to_float64(weight)[:, order.astype(int)], order.astype(int)
    scale, zero_point = (part[:, order] for part in expand(grid, weight.shape[1]))
    upper = np.linalg.cholesky(np.linalg.inv(H[order][:, order])).T
    codes = np.zeros(W.shape)
    for j in range(W.shape[1]):
        position = np.rint(W[:, j] / scale[:, j]) + zero_point[:, j]
        codes[:, j] = np.clip(position, 0, (1 << grid.format.bits) - 1)
        value = scale[:, j] * (codes[:, j] - zero_point[:, j])
        error = (W[:, j] - value) / upper[j, j]
        W[:, j:] -= np.outer(error, upper[j, j:])
    restored = np.zeros(W.shape)
    restored[:, order] = codes
    return restored


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("name", "rows", "in_features"), CASES)
def test_ordered_columns_equal_the_published_algorithm(
    name: str, rows: int, in_features: int, clip: bool, seed: int
) -> None:
    weight, statistics = draw_weight(rows, in_features, seed), draw_statistics(in_features, seed=seed)
    H = statistics.hessian()
    order = np.argsort(-H.diagonal().numpy(), kind="stable")
    grid = find_clipped_grid(weight, FORMATS[name], H.diagonal()) if clip else find_grid(weight, FORMATS[name])
    quantized = quantize_gptq(weight, FORMATS[name], statistics, clip=clip)
    assert np.array_equal(quantized.codes.numpy(), published_codes(weight, to_float64(H), order, grid))
    assert torch.equal(quantized.scale, grid.scale)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "rows", "in_features"), CASES)
def test_columns_from_first_to_last_equal_the_published_algorithm(
    name: str, rows: int, in_features: int, seed: int
) -> None:
    """The grids are those found on the way; that they fit the moved weights is the next test."""
    weight, statistics = draw_weight(rows, in_features, seed), draw_statistics(in_features, seed=seed)
    quantized = quantize_gptq(weight, FORMATS[name], statistics, activation_order=False, clip=False)
    H = to_float64(statistics.hessian())
    codes = published_codes(weight, H, np.arange(in_features), grid_of(quantized))
    assert np.array_equal(quantized.codes.numpy(), codes)


def test_a_later_group_has_the_grid_of_its_moved_weights() -> None:
    weight, statistics = draw_weight(4, 64), draw_statistics(64)
    quantized = quantize_gptq(weight, FORMATS["int2_g32"], statistics, activation_order=False, clip=False)
    H = to_float64(statistics.hessian())
    error = (to_float64(dequantize(quantized)) - to_float64(weight))[:, :32]
    # With the first half fixed, the second is best moved by -error H_12 H_22^-1.
    moved = to_float64(weight)[:, 32:] - error @ H[:32, 32:] @ np.linalg.inv(H[32:, 32:])
    expected = find_grid(torch.from_numpy(moved).float(), FORMATS["int2_channel"])
    # The moved weights are rounded in float32; a scale may then be the next float16.
    torch.testing.assert_close(quantized.scale[:, 1:], expected.scale, rtol=2.0**-10, atol=0)


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("name", ["int2_g32", "int4_channel_sym"])
def test_equal_inputs_leave_nothing_to_make_up_for(name: str, activation_order: bool) -> None:
    weight, isotropic = draw_weight(5, 96), InputStatistics.isotropic(96)

    def rendered(clip: bool) -> torch.Tensor:
        return dequantize(quantize_gptq(weight, FORMATS[name], isotropic, activation_order=activation_order, clip=clip))

    assert torch.equal(rendered(False), dequantize(quantize_rtn(weight, FORMATS[name])))
    assert torch.equal(rendered(True), dequantize(quantize_clipping(weight, FORMATS[name])))


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("name", ["int2_g32", "int3_g64_sym", "int4_channel"])
def test_output_error_falls(name: str, activation_order: bool) -> None:
    weight, statistics = draw_weight(24, 192), draw_statistics(192)
    found = quantize_gptq(weight, FORMATS[name], statistics, activation_order=activation_order)
    clipped = quantize_clipping(weight, FORMATS[name], statistics)
    assert errors_by_row(found, weight, statistics).sum() < 0.7 * errors_by_row(clipped, weight, statistics).sum()


def test_the_output_error_is_a_sum_of_squares_of_the_factor() -> None:
    statistics = draw_statistics(40)
    H, factor = to_float64(statistics.hessian()), to_float64(normalised_factor(statistics.hessian()))
    assert np.allclose(np.triu(factor), factor)
    assert np.allclose(factor.diagonal(), 1.0)
    # H = F diag(p) F', so F^-1 H F'^-1 is diagonal.
    pivots = np.linalg.solve(factor, np.linalg.solve(factor, H).T)
    assert np.abs(pivots - np.diag(pivots.diagonal())).max() < 1e-4 * pivots.diagonal().max()


def test_dead_channels_are_rounded_to_nearest() -> None:
    weight, format_ = draw_weight(4, 64), FORMATS["int3_g32"]
    for damping in (0.0, 0.1):
        statistics = draw_statistics(64, dead=(3, 40), damping=damping)
        quantized = quantize_gptq(weight, format_, statistics)
        nearest = grid_of(quantized).codes_of(weight)
        assert torch.equal(quantized.codes[:, [3, 40]], nearest[:, [3, 40]].to(torch.uint8))


def test_float64_where_float32_fails() -> None:
    # Determinant one, eigenvalues 4e6 and 2.5e-7: exact in float32, and indefinite after its roundings.
    x = torch.tensor([[1001.0, 1000.0], [1000.0, 999.0]])
    H = x.T @ x
    _, failed = torch.linalg.cholesky_ex(H.flip(0, 1))
    assert bool(failed)
    # R_01 / R_11 = H_01 / H_11; the damping that comes next would change it by 1e-6 of itself.
    assert float(normalised_factor(H)[0, 1]) == pytest.approx(2_000_000 / 1_998_001, rel=2.0**-23)
    weight, statistics = draw_weight(8, 2), InputStatistics(second_moment=H, count=1.0, damping=0.0)
    quantized = quantize_gptq(weight, FORMATS["int4_channel"], statistics)
    order = np.argsort(-to_float64(H).diagonal(), kind="stable")
    codes = published_codes(weight, to_float64(H), order, grid_of(quantized))
    assert np.array_equal(quantized.codes.numpy(), codes)


def test_indefinite_second_moment_is_refused() -> None:
    statistics = InputStatistics(second_moment=torch.tensor([[1.0, 2.0], [2.0, 1.0]]), count=1.0)
    with pytest.raises(ValueError, match="second_moment must be positive semidefinite: got one .* in_features=2"):
        quantize_gptq(draw_weight(2, 2), FORMATS["int4_channel"], statistics)
