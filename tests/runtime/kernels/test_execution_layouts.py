"""Weights in execution layouts, of every instruction set at hand, against their codecs and float64."""

import pytest
import torch
from torch import Tensor

from runtime.apply import pack_weight
from runtime.formats import FORMATS
from runtime.kernels.build import find_compiler
from runtime.kernels.cpu import CpuKernels, load_kernels
from runtime.kernels.dispatch import kernel_path
from runtime.kernels.matrices import Matrix
from runtime.kernels.weight_views import execution_bytes, find_matrix, use_execution_
from runtime.packed import QuantizedLinear
from tests.runtime.kernels.stored_weights import FLOAT_EPS, ROW_BLOCK, available_kernels, draw_activations

KERNELS = available_kernels()
pytestmark = pytest.mark.skipif(not KERNELS and find_compiler() is None, reason="no C++ compiler is here")
PLANES = [name for name, f in FORMATS.items() if f.kind == "planes" or (f.kind, f.scale_type) == ("binary", "pow2")]
HALVES = [name for name, f in FORMATS.items() if f.kind == "searched_float" or name.startswith("intfp8")]
FLOATS = ["fp6_e3m2_g32", "fp6_e3m2_channel", "mxfp6_e3m2"]
MIXTURES = [name for name, f in FORMATS.items() if f.kind == "group_mixture"]
OF_LEVELS = ["mxfp4", "nvfp4", "int5_g32_pow2", "ternary_g32", "bitmod3_g64", "q4_1"]


def lay_out(linear: QuantizedLinear, kernels: CpuKernels) -> Matrix:
    """Gives the layer's weight its execution layout and returns the view of it."""
    memory = torch.zeros(execution_bytes(linear.weight, kernels), dtype=torch.uint8)
    use_execution_(linear.weight, kernels, memory)
    matrix = find_matrix(linear.weight, torch.device("cpu"))
    assert matrix is not None
    return matrix


def make_linear(format_name: str, rows: int = 37, columns: int = 512) -> QuantizedLinear:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) + 0.2
    return QuantizedLinear(pack_weight(weight, FORMATS[format_name]))


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
@pytest.mark.parametrize("format_name", [*PLANES, *OF_LEVELS, *FLOATS, *MIXTURES, *HALVES])
def test_a_layout_holds_the_weight_and_its_products_are_near_those_in_float64(
    format_name: str, kernels: CpuKernels
) -> None:
    for rows in (1, 37):
        linear = make_linear(format_name, rows)
        dense = linear.weight()
        assert find_matrix(linear.weight, torch.device("cpu")) is None
        matrix = lay_out(linear, kernels)
        # Sums of a few planes, or a step times a level less a shift, in float32.
        assert torch.allclose(kernels.dequantize(matrix), dense, rtol=1e-6, atol=1e-6 * float(dense.abs().max()))
        with kernel_path(kernels.level):
            for tokens in (1, 2, 3, 4, 9):
                x = draw_activations(tokens, 512)
                expected = x.double() @ dense.double().T
                assert ((linear(x) - expected).abs() <= bound_error(matrix, dense, x)).all()


def bound_error(matrix: Matrix, dense: Tensor, x: Tensor) -> Tensor:
    """Returns a bound on what a product may be off by: half a step of 15-bit activations, and sums in float32.

    Partial sums are of planes, levels and shifts, none more than eight times the largest weight.
    """
    block = ROW_BLOCK if matrix.group_size == matrix.columns else matrix.group_size
    step = x.double().abs().view(len(x), -1, block).amax(-1).repeat_interleave(block, 1) / 16383
    sums = 8 * dense.double().abs().max() * x.double().abs().sum(1, keepdim=True)
    return 1.001 * step / 2 @ dense.double().abs().T + 2 * (matrix.columns / 16 + 32) * FLOAT_EPS * sums


@pytest.mark.parametrize("kernels", KERNELS, ids=lambda k: k.level)
@pytest.mark.parametrize("exponents", [(-24, 15), (-8, 16)])
def test_every_power_of_two_is_a_scale_of_planes(exponents: tuple[int, int], kernels: CpuKernels) -> None:
    linear = make_linear("bcq2_g64_pow2", rows=8)
    scale = linear.weight.get_buffer("scale")
    scale.copy_(torch.linspace(*exponents, scale.numel()).round().to(torch.int8).view(scale.shape))
    assert torch.equal(kernels.dequantize(lay_out(linear, kernels)), linear.weight())


@pytest.mark.parametrize("format_name", ["int2_mix25int4_g64_outliers", "fp6_e3m2_channel"])
def test_a_weight_that_is_laid_out_in_several_blocks_of_rows(format_name: str) -> None:
    kernels = load_kernels()
    assert kernels is not None
    linear = make_linear(format_name, rows=150, columns=32768)
    assert torch.allclose(kernels.dequantize(lay_out(linear, kernels)), linear.weight(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("format_name", ["bcq3_g64", "mxfp4"])
def test_a_layout_is_dropped_when_other_numbers_are_loaded(format_name: str) -> None:
    kernels = load_kernels()
    assert kernels is not None
    linear, other = make_linear(format_name), QuantizedLinear(pack_weight(torch.ones(37, 512), FORMATS[format_name]))
    lay_out(linear, kernels)
    linear.load_state_dict(other.state_dict())
    assert find_matrix(linear.weight, torch.device("cpu")) is None
    assert torch.equal(linear(draw_activations(2, 512)), other(draw_activations(2, 512)))
