"""Random weights in the stored layout, and what is known of products with them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.kernels.cpu import LEVELS, CpuKernels, load_kernels
from runtime.kernels.matrices import StoredMatrix
from runtime.packing import pack_codes
from runtime.quantization import dequantize_codes

ROW_BLOCK = 128
LARGEST_ACTIVATION = 32639
FLOAT_EPS = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class Case:
    """A weight [rows, columns] of random codes, scales and zero points; group_size None is a whole row."""

    bits: int
    group_size: int | None
    symmetric: bool
    rows: int
    columns: int

    def __str__(self) -> str:
        group = self.group_size or "channel"
        return f"{self.bits}b-{group}-{'sym' if self.symmetric else 'asym'}-{self.rows}x{self.columns}"


def make_weight(case: Case, seed: int = 0) -> tuple[StoredMatrix, Tensor]:
    """Returns the stored weight and its float32 values."""
    generator = torch.Generator().manual_seed(seed)

    def draw_codes(count: int) -> Tensor:
        return torch.randint(0, 2**case.bits, (case.rows, count), generator=generator, dtype=torch.uint8)

    groups = case.columns // (case.group_size or case.columns)
    codes = draw_codes(case.columns)
    scale = (torch.rand(case.rows, groups, generator=generator) + 0.1).to(torch.float16)
    zero_point = None if case.symmetric else draw_codes(groups)
    packed_zeros = None if zero_point is None else pack_codes(zero_point, case.bits)
    stored = StoredMatrix(pack_codes(codes, case.bits), scale, packed_zeros, case.bits, case.columns)
    return stored, dequantize_codes(codes, scale, zero_point, case.bits)


def draw_activations(tokens: int, columns: int, seed: int = 1) -> Tensor:
    """Normal numbers [tokens, columns] with one outlier of 20 standard deviations in a column."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    x[:, columns // 2] *= 20
    return x


def bound_error(case: Case, dense: Tensor, x: Tensor, largest_activation: int = LARGEST_ACTIVATION) -> Tensor:
    """Returns a bound [tokens, rows] on what rounding may do to x W', in float64.

    Half a step of every activation, the step being its block's largest magnitude over ``largest_activation``; and of
    float32 sums over the parts that the code and the zero point contribute, each at most scale * 2^bits * |x|, a few
    roundings each.
    """
    block = case.group_size or ROW_BLOCK
    magnitude = torch.nn.functional.pad(x.double().abs(), (0, -case.columns % block))
    step = magnitude.view(len(x), -1, block).amax(-1).repeat_interleave(block, 1)[:, : case.columns]
    rounded = (step / largest_activation / 2) @ dense.double().abs().T
    largest = 1.1 * 2**case.bits * x.double().abs().sum(1, keepdim=True)
    return 1.001 * rounded + 2 * (case.columns / 16 + 32) * FLOAT_EPS * largest


def available_kernels() -> list[CpuKernels]:
    """Returns the kernels of every instruction set that this processor has."""
    best = load_kernels()
    if best is None:
        return []
    found = [load_kernels(level) for level in LEVELS[: LEVELS.index(best.level) + 1]]
    return [kernels for kernels in found if kernels is not None]
