"""Who can run a format: engines whose own tensors hold its codes and scales as they are.

A rule says what an engine's documentation and source accept for one weight. What it fuses, and which mixtures it takes,
is not said here.
"""

from collections.abc import Callable

from runtime.storage import Format


def _llama_cpp(format_: Format) -> bool:
    return format_.kind in ("ggml", "float") or format_.name == "mxfp4"


def _compressed_tensors(format_: Format) -> bool:
    """pack-quantized integers of 2 to 8 bits, FP8 by channel, and the block formats it names."""
    return format_.kind in ("int", "float") or format_.name in ("fp8_e4m3_channel", "mxfp4", "mxfp8_e4m3", "nvfp4")


def _vllm(format_: Format) -> bool:
    """Marlin's widths and groups on a GPU; FP8 by channel, MXFP4 and NVFP4."""
    if format_.kind == "int":
        grouped = format_.group_size in (32, 64, 128, None)
        return grouped and (format_.bits == 4 or (format_.bits == 8 and format_.symmetric))
    return format_.unquantized or format_.name in ("fp8_e4m3_channel", "mxfp4", "nvfp4")


def _mlx(format_: Format) -> bool:
    """Affine integers, and three block formats."""
    if format_.kind == "int":
        return format_.bits in (2, 3, 4, 5, 6, 8) and format_.group_size in (32, 64, 128)
    return format_.unquantized or format_.name in ("mxfp4", "nvfp4", "mxfp8_e4m3")


def _onnx_runtime(format_: Format) -> bool:
    """MatMulNBits."""
    if format_.kind == "int":
        return format_.bits in (2, 4, 8) and format_.group_size is not None
    return format_.unquantized


ENGINES: dict[str, Callable[[Format], bool]] = {
    "bitplan": lambda format_: True,
    "llama.cpp": _llama_cpp,
    "compressed-tensors": _compressed_tensors,
    "vLLM": _vllm,
    "MLX": _mlx,
    "ONNX Runtime": _onnx_runtime,
}


def engines_of(format_: Format) -> tuple[str, ...]:
    """Returns the names of the engines that can run a format."""
    return tuple(name for name, runs in ENGINES.items() if runs(format_))
