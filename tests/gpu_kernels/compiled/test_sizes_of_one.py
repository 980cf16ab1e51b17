"""Kernels compile where a size is one: Triton makes a constant of it, which has none of a tensor's methods.

The interpreter does not, so a single token of a single row of weights is compiled here.
"""

from typing import Any

import pytest
from triton.backends.compiler import GPUTarget

from runtime.kernels.triton.aot import compile_kernel
from runtime.kernels.triton.group_mixture_kernel import group_mixture_kernel, outlier_kernel
from runtime.kernels.triton.grouped_experts_kernel import grouped_experts_kernel
from runtime.kernels.triton.parted_kernel import dequantize_parts_kernel, parted_kernel
from runtime.kernels.triton.residual_blocks_kernel import residual_blocks_kernel
from runtime.kernels.triton.row_scaling_kernel import scale_rows_kernel
from runtime.kernels.triton.weight_only_kernel import weight_only_kernel

LAUNCH = {"TILES": 1, "WARPS": 1, "STAGES": 3, "UPCAST": False}
PRODUCT = {**LAUNCH, "BLOCK_M": 8, "HAS_EXPONENT": True, "HAS_BIAS": True}
WEIGHT = {"BITS": 4, "GROUP_SIZE": 64, "SYMMETRIC": False, "SCALE": "fp16", "ELEMENT": -1}
PARTS = {"PARTS": ((4, 8.0, 1.0), (2, 2.0, 0.25)), "SCALES": 1, "SCALE": "fp16", "GROUP_SIZE": 64}
KERNELS: dict[str, tuple[Any, dict[str, object]]] = {
    "weight_only": (weight_only_kernel, {**PRODUCT, **WEIGHT}),
    "parted": (parted_kernel, {**PRODUCT, **PARTS}),
    "dequantize_parts": (dequantize_parts_kernel, {**PARTS, "WARPS": 1}),
    "group_mixture": (group_mixture_kernel, {**PRODUCT, "GROUP_SIZE": 32}),
    "grouped_experts": (
        grouped_experts_kernel,
        {
            "KINDS": ((2, 64, True, 1, "fp16", -1), (4, 32, True, 1, "e8m0", 1)),
            "GATED": True,
            "BLOCK_M": 8,
            "WARPS": 1,
            "STAGES": 3,
            "UPCAST": False,
        },
    ),
    "outlier": (outlier_kernel, {"BLOCK": 128}),
    "residual_blocks": (residual_blocks_kernel, {**LAUNCH, "BLOCK_M": 8, "RANK": 1, "X_PARTS": 2}),
    "scale_rows": (scale_rows_kernel, {"HAS_FACTORS": True, "PARTS": 2, "BLOCK": 1024}),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_sizes_of_one(name: str) -> None:
    kernel, constants = KERNELS[name]
    sizes = [
        argument
        for argument in kernel.arg_names
        if not argument.endswith("_ptr") and argument not in constants and argument not in ("x_stride", "factor")
    ]
    assert sizes
    compiled = compile_kernel(
        kernel,
        {**constants, **dict.fromkeys(sizes, 1)},
        "fp16",
        GPUTarget("cuda", 90, 32),
        {"num_warps": 1, "num_stages": 3},
    )
    assert compiled.asm["cubin"]
