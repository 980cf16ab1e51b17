"""Compiles the products with sums of parts, mixed groups and residual blocks for GPUs that are not at hand."""

from typing import Any

from triton.backends.compiler import GPUTarget

from runtime.kernels.triton.aot import (
    THREADS_PER_AMD_WARP,
    THREADS_PER_WARP,
    CompiledProduct,
    compile_kernel,
)
from runtime.kernels.triton.group_mixture_kernel import group_mixture_kernel, outlier_kernel
from runtime.kernels.triton.launch_table import Launch, LaunchKey
from runtime.kernels.triton.parted_kernel import dequantize_parts_kernel, parted_kernel
from runtime.kernels.triton.parted_layout import CodePart
from runtime.kernels.triton.residual_blocks_kernel import residual_blocks_kernel
from runtime.kernels.triton.sass import KernelCode, read_code


def compile_parted_product(
    key: LaunchKey, launch: Launch, parts: tuple[CodePart, ...], *, each_scaled: bool, dtype: str, scale: str = "fp16"
) -> CompiledProduct:
    """Returns the product with a sum of parts compiled for ``key.architecture``.

    Args:
        key: The product; its bits are those of all parts.
        launch: Its launch.
        parts: What the codes stand for.
        each_scaled: Each part has scales of its own.
        dtype: Type of x, ``fp16`` or ``bf16``.
        scale: Type of the scales (``fragment_layout.SCALE_NAMES``).
    """
    constants = {**_list_product_constants(parts, each_scaled, key.group_size, launch), "SCALE": scale}
    return _compile_product(parted_kernel, constants, dtype, key.architecture, launch)


def compile_parted_product_amd(
    launch: Launch, parts: tuple[CodePart, ...], group_size: int | None, *, each_scaled: bool, architecture: str
) -> str:
    """Returns the assembly of the product of float16 with a sum of parts for an AMD architecture."""
    constants = _list_product_constants(parts, each_scaled, group_size, launch)
    return _compile_amd(parted_kernel, constants, launch, architecture)


def compile_residual_product(launch: Launch, *, architecture: int, rank: int, x_parts: int) -> CompiledProduct:
    """Returns the product with residual blocks compiled for a compute capability.

    Args:
        launch: Its launch.
        architecture: Compute capability times ten.
        rank: Rank of the magnitudes.
        x_parts: 2 for float32 activations, else 1.
    """
    constants = {"RANK": rank, "X_PARTS": x_parts, **_list_launch_constants(launch)}
    return _compile_product(residual_blocks_kernel, constants, "fp16", architecture, launch)


def compile_residual_product_amd(launch: Launch, *, architecture: str, rank: int) -> str:
    """Returns the assembly of the product of float16 with residual blocks for an AMD architecture."""
    constants = {"RANK": rank, "X_PARTS": 1, **_list_launch_constants(launch)}
    return _compile_amd(residual_blocks_kernel, constants, launch, architecture)


def compile_group_mixture(key: LaunchKey, launch: Launch, *, dtype: str) -> CompiledProduct:
    """Returns the product with groups of 2 and of 4 bits compiled for ``key.architecture``.

    Args:
        key: The product, of 2 bits.
        launch: Its launch.
        dtype: Type of x, ``fp16`` or ``bf16``.
    """
    constants = _list_mixture_constants(key.group_size, launch)
    return _compile_product(group_mixture_kernel, constants, dtype, key.architecture, launch)


def compile_group_mixture_amd(launch: Launch, group_size: int, *, architecture: str) -> str:
    """Returns the assembly of the product of float16 with groups of 2 and of 4 bits for an AMD architecture."""
    return _compile_amd(group_mixture_kernel, _list_mixture_constants(group_size, launch), launch, architecture)


def compile_outliers(*, architecture: int, dtype: str) -> KernelCode:
    """Returns the product with outliers compiled for a compute capability."""
    target = GPUTarget("cuda", architecture, THREADS_PER_WARP)
    kernel = compile_kernel(outlier_kernel, {"BLOCK": 128}, dtype, target, {"num_warps": 4})
    return read_code(kernel.asm["cubin"])


def compile_parted_dequantization(
    parts: tuple[CodePart, ...], group_size: int | None, *, each_scaled: bool, architecture: int, dtype: str
) -> KernelCode:
    """Returns the dequantization of a sum of parts to ``fp16`` or ``bf16``, compiled for a compute capability."""
    constants = {**_list_constants(parts, each_scaled, group_size), "WARPS": 2}
    target = GPUTarget("cuda", architecture, THREADS_PER_WARP)
    kernel = compile_kernel(dequantize_parts_kernel, constants, dtype, target, {"num_warps": 4}, out=dtype)
    return read_code(kernel.asm["cubin"])


def _compile_product(
    function: Any, constants: dict[str, object], dtype: str, architecture: int, launch: Launch
) -> CompiledProduct:
    target = GPUTarget("cuda", architecture, THREADS_PER_WARP)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.max_registers}
    kernel = compile_kernel(function, constants, dtype, target, options)
    return CompiledProduct(
        code=read_code(kernel.asm["cubin"]),
        shared_bytes=kernel.metadata.shared,
        weights_per_step=64 * 64 * launch.tiles // THREADS_PER_WARP,
    )


def _compile_amd(function: Any, constants: dict[str, object], launch: Launch, architecture: str) -> str:
    target = GPUTarget("hip", architecture, THREADS_PER_AMD_WARP)
    # Half as many warps of twice the threads: a thread's share of the words stays 16 bytes.
    options = {"num_warps": launch.warps * THREADS_PER_WARP // THREADS_PER_AMD_WARP, "num_stages": launch.stages}
    return str(compile_kernel(function, constants, "fp16", target, options).asm["amdgcn"])


def _list_mixture_constants(group_size: int | None, launch: Launch) -> dict[str, object]:
    of_launch = _list_launch_constants(launch)
    return {"GROUP_SIZE": group_size, "HAS_EXPONENT": False, "HAS_BIAS": False, **of_launch}


def _list_product_constants(
    parts: tuple[CodePart, ...], each_scaled: bool, group_size: int | None, launch: Launch
) -> dict[str, object]:
    of_weight = _list_constants(parts, each_scaled, group_size)
    return {**of_weight, "HAS_EXPONENT": False, "HAS_BIAS": False, **_list_launch_constants(launch)}


def _list_launch_constants(launch: Launch) -> dict[str, object]:
    return {
        "TILES": launch.tiles,
        "BLOCK_M": launch.block_m,
        "WARPS": launch.warps,
        "STAGES": launch.stages,
        "UPCAST": False,
    }


def _list_constants(parts: tuple[CodePart, ...], each_scaled: bool, group_size: int | None) -> dict[str, object]:
    return {
        "PARTS": tuple((part.bits, part.zero, part.factor) for part in parts),
        "SCALES": len(parts) if each_scaled else 1,
        "SCALE": "fp16",
        "GROUP_SIZE": group_size or 0,
    }
