"""Compiles attention over packed caches for GPUs that are not at hand (``aot``)."""

import torch
import triton
from triton.backends.compiler import GPUTarget

from runtime.kernels.triton.aot import THREADS_PER_AMD_WARP, THREADS_PER_WARP, CompiledProduct, compile_kernel
from runtime.kernels.triton.decode_attention import LEAST_HEADS, LEAST_HEADS_AMD, States, find_precision
from runtime.kernels.triton.decode_attention_kernel import attention_splits_kernel, sum_attention_kernel
from runtime.kernels.triton.launch_table import AttentionLaunch
from runtime.kernels.triton.sass import KernelCode, read_code

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def compile_decode_attention(
    keys: States, values: States, *, architecture: int, dtype: str, head_dim: int, shared: int, launch: AttentionLaunch
) -> CompiledProduct:
    """Returns the attention over a packed cache compiled for a compute capability; a weight is a number of a head.

    Args:
        keys, values: Descriptions of their rows (``cache_unpacking``).
        architecture: Compute capability times ten.
        dtype: Type of the query, ``fp16``, ``bf16`` or ``fp32``.
        head_dim: Numbers of a head, of keys and of values.
        shared: Query heads of a key head.
        launch: Its launch.
    """
    target = GPUTarget("cuda", architecture, THREADS_PER_WARP)
    constants = _attention_constants(keys, values, head_dim, shared, launch, LEAST_HEADS)
    constants["PRECISION"] = find_precision(DTYPES[dtype], amd=False)
    options = {"num_warps": launch.warps, "maxnreg": launch.max_registers}
    kernel = compile_kernel(attention_splits_kernel, constants, dtype, target, options)
    return CompiledProduct(
        code=read_code(kernel.asm["cubin"]),
        shared_bytes=kernel.metadata.shared,
        weights_per_step=2 * launch.block_tokens * head_dim // (THREADS_PER_WARP * launch.warps),
    )


def compile_decode_attention_amd(
    keys: States, values: States, *, architecture: str, dtype: str, head_dim: int, shared: int, launch: AttentionLaunch
) -> str:
    """Returns the assembly of the attention over a packed cache for an AMD architecture."""
    target = GPUTarget("hip", architecture, THREADS_PER_AMD_WARP)
    constants = _attention_constants(keys, values, head_dim, shared, launch, LEAST_HEADS_AMD)
    return str(
        compile_kernel(attention_splits_kernel, constants, dtype, target, {"num_warps": launch.warps}).asm["amdgcn"]
    )


def compile_attention_sum(*, architecture: int, dtype: str, head_dim: int) -> KernelCode:
    """Returns the sum of the splits, compiled for a compute capability."""
    target = GPUTarget("cuda", architecture, THREADS_PER_WARP)
    constants: dict[str, object] = {"VALUE_DIM": head_dim}
    kernel = compile_kernel(sum_attention_kernel, constants, dtype, target, {"num_warps": 1}, out=dtype)
    return read_code(kernel.asm["cubin"])


def _attention_constants(
    keys: States, values: States, head_dim: int, shared: int, launch: AttentionLaunch, least_heads: int
) -> dict[str, object]:
    return {
        "KEYS": keys,
        "VALUES": values,
        "KEY_DIM": head_dim,
        "VALUE_DIM": head_dim,
        "SHARED": shared,
        "BLOCK_H": max(least_heads, triton.next_power_of_2(shared)),
        "BLOCK": launch.block_tokens,
        "STAGES": launch.stages,
        "HAS_MASK": False,
        "PRECISION": "ieee",
        "UPCAST": False,
    }
