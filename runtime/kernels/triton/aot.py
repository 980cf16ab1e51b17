"""Compiles the kernels for GPUs that are not at hand: what the compiler makes of them can be read anywhere."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from runtime.kernels.triton.activation_rounding_kernel import round_rows_kernel
from runtime.kernels.triton.dequantize_kernel import dequantize_kernel
from runtime.kernels.triton.grouped_experts import Kind
from runtime.kernels.triton.grouped_experts_kernel import grouped_experts_kernel
from runtime.kernels.triton.integer_product_kernel import integer_product_kernel
from runtime.kernels.triton.launch_table import Launch, LaunchKey
from runtime.kernels.triton.row_scaling import needs_scaled_rows
from runtime.kernels.triton.row_scaling_kernel import scale_rows_kernel
from runtime.kernels.triton.sass import KernelCode, read_code
from runtime.kernels.triton.weight_only_kernel import sum_splits_kernel, weight_only_kernel

THREADS_PER_WARP = 32
THREADS_PER_AMD_WARP = 64
# Pointers are at addresses, and rows at strides, that 16 divides: torch allocates so, and rows are padded to 64.
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True, kw_only=True)
class CompiledProduct:
    """A product compiled for an NVIDIA GPU.

    Args:
        code: Its machine code.
        shared_bytes: Shared memory of a program.
        weights_per_step: Weights that a thread multiplies in one round of the main loop.
    """

    code: KernelCode
    shared_bytes: int
    weights_per_step: int

    @property
    def instructions_per_weight(self) -> float:
        """Instructions of a thread in the main loop for each weight it multiplies."""
        return self.code.loop_length / self.weights_per_step


def compile_weight_only(
    key: LaunchKey, launch: Launch, *, dtype: str, symmetric: bool = False, element: int = -1, scale: str = "fp16"
) -> CompiledProduct:
    """Returns the weight-only product compiled for ``key.architecture``.

    Args:
        key: The product.
        launch: Its launch.
        dtype: Type of x, ``fp16`` or ``bf16``.
        symmetric: No zero points.
        element: Mantissa bits of codes that are floats, -1 for integers.
        scale: Type of the scales (``fragment_layout.SCALE_NAMES``).
    """
    target = GPUTarget("cuda", key.architecture, THREADS_PER_WARP)
    scaled = needs_scaled_rows(torch.bfloat16 if dtype == "bf16" else torch.float16, key.bits, element)
    kernel = compile_kernel(
        weight_only_kernel,
        {
            **_weight_only_constants(key, launch, symmetric),
            "HAS_EXPONENT": scaled,
            "ELEMENT": element,
            "SCALE": scale,
        },
        "fp16" if scaled else dtype,
        target,
        {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.max_registers},
    )
    return CompiledProduct(
        code=read_code(kernel.asm["cubin"]),
        shared_bytes=kernel.metadata.shared,
        weights_per_step=64 * launch.warps * 64 * launch.tiles // (THREADS_PER_WARP * launch.warps),
    )


def compile_integer_product(key: LaunchKey, launch: Launch, *, symmetric: bool = False) -> CompiledProduct:
    """Returns the product with activations of 8 bits compiled for ``key.architecture``, as ``compile_weight_only``."""
    target = GPUTarget("cuda", key.architecture, THREADS_PER_WARP)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "maxnreg": launch.max_registers}
    kernel = compile_kernel(integer_product_kernel, _integer_constants(key, launch, symmetric), "i8", target, options)
    return CompiledProduct(
        code=read_code(kernel.asm["cubin"]),
        shared_bytes=kernel.metadata.shared,
        weights_per_step=64 * launch.warps * 64 * launch.tiles // (THREADS_PER_WARP * launch.warps),
    )


def compile_grouped_experts(
    kinds: tuple[Kind, ...], *, architecture: int, block_m: int, gated: bool
) -> CompiledProduct:
    """Returns the experts' product compiled for a compute capability, for float16 activations.

    Args:
        kinds: Each kind of expert, as ``FragmentExperts`` names it.
        architecture: Compute capability times ten.
        block_m: Rows of x in a program.
        gated: With gate, up projection and activation.
    """
    constants = {
        "KINDS": kinds,
        "GATED": gated,
        "BLOCK_M": block_m,
        "WARPS": 2,
        "STAGES": 3,
        "UPCAST": False,
    }
    target = GPUTarget("cuda", architecture, THREADS_PER_WARP)
    options = {"num_warps": 2, "num_stages": 3, "maxnreg": 255}
    kernel = compile_kernel(grouped_experts_kernel, constants, "fp16", target, options)
    return CompiledProduct(
        code=read_code(kernel.asm["cubin"]),
        shared_bytes=kernel.metadata.shared,
        weights_per_step=64 * 64 // THREADS_PER_WARP * max(kind[3] for kind in kinds),
    )


def compile_dequantization(
    bits: int, group_size: int | None, *, architecture: int, dtype: str, symmetric: bool, scale: str = "fp16"
) -> KernelCode:
    """Returns the dequantization of a weight to ``fp16`` or ``bf16``, compiled for a compute capability."""
    constants: dict[str, object] = {
        "BITS": bits,
        "GROUP_SIZE": group_size or 0,
        "SYMMETRIC": symmetric,
        "SCALE": scale,
        "EXACT": dtype == "fp16",
        "ELEMENT": -1,
        "WARPS": 2,
    }
    target = GPUTarget("cuda", architecture, THREADS_PER_WARP)
    return read_code(
        compile_kernel(dequantize_kernel, constants, dtype, target, {"num_warps": 4}, out=dtype).asm["cubin"]
    )


def compile_split_sum(splits: int, *, architecture: int, dtype: str) -> KernelCode:
    """Returns the sum of a split product, compiled for a compute capability."""
    constants: dict[str, object] = {"SPLITS": splits, "HAS_BIAS": True, "BLOCK": 1024}
    target = GPUTarget("cuda", architecture, THREADS_PER_WARP)
    return read_code(
        compile_kernel(sum_splits_kernel, constants, dtype, target, {"num_warps": 4}, out=dtype).asm["cubin"]
    )


def compile_row_scaling(*, architecture: int, dtype: str, has_factors: bool = False) -> KernelCode:
    """Returns the scaling of rows in ``bf16`` or ``fp32``, compiled for a compute capability."""
    constants: dict[str, object] = {"HAS_FACTORS": has_factors, "PARTS": 2 if dtype == "fp32" else 1, "BLOCK": 1024}
    target = GPUTarget("cuda", architecture, THREADS_PER_WARP)
    return read_code(
        compile_kernel(scale_rows_kernel, constants, dtype, target, {"num_warps": 4}, out="fp16").asm["cubin"]
    )


def compile_row_rounding(*, architecture: int, dtype: str) -> KernelCode:
    """Returns the rounding of rows in ``fp16``, ``bf16`` or ``fp32`` to 8 bits, compiled for a compute capability."""
    constants: dict[str, object] = {"REACH": 127.5, "LIMIT": 128, "HAS_SCALE": False, "QUAD_STEP": 8, "BLOCK": 1024}
    target = GPUTarget("cuda", architecture, THREADS_PER_WARP)
    return read_code(
        compile_kernel(round_rows_kernel, constants, dtype, target, {"num_warps": 4}, out="i8").asm["cubin"]
    )


def compile_weight_only_amd(key: LaunchKey, launch: Launch, *, dtype: str, architecture: str) -> str:
    """Returns the assembly of the weight-only product for an AMD architecture such as ``gfx942``."""
    constants = _weight_only_constants(key, launch, False)
    return _compile_amd(weight_only_kernel, constants, dtype, launch, architecture)


def compile_integer_product_amd(key: LaunchKey, launch: Launch, *, architecture: str) -> str:
    """Returns the assembly of the product with activations of 8 bits for an AMD architecture."""
    return _compile_amd(integer_product_kernel, _integer_constants(key, launch, False), "i8", launch, architecture)


def _compile_amd(function: Any, constants: dict[str, object], dtype: str, launch: Launch, architecture: str) -> str:
    target = GPUTarget("hip", architecture, THREADS_PER_AMD_WARP)
    # Half as many warps of twice the threads: a thread's share of the words stays 16 bytes.
    options = {"num_warps": launch.warps * THREADS_PER_WARP // THREADS_PER_AMD_WARP, "num_stages": launch.stages}
    return str(compile_kernel(function, constants, dtype, target, options).asm["amdgcn"])


def _weight_only_constants(key: LaunchKey, launch: Launch, symmetric: bool) -> dict[str, object]:
    return {
        "BITS": key.bits,
        "GROUP_SIZE": key.group_size or 0,
        "SYMMETRIC": symmetric,
        "SCALE": "fp16",
        "HAS_EXPONENT": False,
        "HAS_BIAS": False,
        "TILES": launch.tiles,
        "BLOCK_M": launch.block_m,
        "WARPS": launch.warps,
        "STAGES": launch.stages,
        "UPCAST": False,
        "ELEMENT": -1,
    }


def _integer_constants(key: LaunchKey, launch: Launch, symmetric: bool) -> dict[str, object]:
    named = _weight_only_constants(key, launch, symmetric)
    return {name: value for name, value in named.items() if name not in ("HAS_EXPONENT", "UPCAST", "ELEMENT")}


def _type_states(states: Any, dtype: str) -> str:
    return f"*{dtype}" if states and states[0] == 16 else "*i32"


def compile_kernel(
    function: Any,
    constants: dict[str, object],
    dtype: str,
    target: Any,
    options: dict[str, int],
    *,
    out: str = "fp32",
) -> Any:
    """Returns a kernel compiled by Triton.

    Args:
        function: The kernel.
        constants: Its constants.
        dtype: Type of what it reads that is no code, scale or index.
        target: The GPU.
        options: Those of Triton's launch.
        out: Type of what it writes.
    """
    types = {
        "x_ptr": f"*{dtype}",
        "factor": "fp32",
        "x_scale_ptr": "*fp32",
        "given_ptr": "*fp32",
        "exponent_ptr": "*i32",
        "factor_ptr": "*fp16",
        "left_ptr": "*fp16",
        "low_words_ptr": "*i32",
        "low_zero_ptr": "*i32",
        "flags_ptr": "*i32",
        "starts_ptr": "*i32",
        "outlier_ptr": "*fp16",
        "outlier_column_ptr": "*i16",
        "bias_ptr": f"*{dtype}",
        "out_ptr": f"*{out}",
        "partial_ptr": "*fp32",
        "kind_ptr": "*i32",
        "expert_factor_ptr": "*fp32",
        "token_ptr": "*i64",
        "offset_ptr": "*i64",
        "block_expert_ptr": "*i64",
        "block_first_ptr": "*i64",
        "block_last_ptr": "*i64",
        "words_ptr": "*i32",
        "query_ptr": f"*{dtype}",
        "key_words_ptr": _type_states(constants.get("KEYS"), dtype),
        "value_words_ptr": _type_states(constants.get("VALUES"), dtype),
        "key_scale_ptr": "*fp16",
        "value_scale_ptr": "*fp16",
        "key_zero_ptr": "*u8",
        "value_zero_ptr": "*u8",
        "key_tail_ptr": f"*{dtype}",
        "value_tail_ptr": f"*{dtype}",
        "mask_ptr": "*u8",
        "total_ptr": "*fp32",
        "scaling": "fp32",
        "scale_ptr": "*i32",
        "zero_ptr": "*i32",
    }
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(i,): _ALIGNED for i, name in enumerate(names) if name.endswith("_ptr") or name == "x_stride"}
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})
