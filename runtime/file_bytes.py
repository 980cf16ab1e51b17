"""Bytes of a weight in a file: the packed one of our own, and those of engines that add to what a format stores.

compressed-tensors fills words of four bytes, along the rows with codes and down the columns with zero points, and says
the shape of each module in two numbers of eight bytes. MLX has a float16 bias for each group where formats have a zero
point or none. Headers are padded to a length that no choice changes and are not counted here, but for formats of so
many tensors that their names need more.
"""

from collections.abc import Callable
from math import ceil

from runtime.checkpoint import further_header_bytes
from runtime.formats import Format
from runtime.units import Weight

_WORD_BYTES, _SHAPE_BYTES, _SCALE_BYTES = 4, 16, 2


def compressed_tensors_bytes(weight: Weight, format_: Format) -> int:
    """Returns the bytes of a weight in compressed-tensors; those of the format where it cannot be written there."""
    if format_.kind != "int":
        return format_.storage_bytes(weight.shape)
    # The gate and up projection of an expert are a module each.
    modules = 2 if weight.expert_index is not None and weight.parameter.endswith("gate_up_proj") else 1
    rows, in_features = weight.shape[0] // modules, weight.shape[1]
    groups = format_.group_count(in_features)
    module = _words(in_features, format_.bits) * rows + _SCALE_BYTES * rows * groups + _SHAPE_BYTES
    return modules * (module + (0 if format_.symmetric else _words(rows, format_.bits) * groups))


def mlx_bytes(weight: Weight, format_: Format) -> int:
    """Returns the bytes of a weight in MLX's file; those of the format where it cannot be written there."""
    if format_.kind != "int":
        return format_.storage_bytes(weight.shape)
    rows, in_features = weight.shape
    return format_.code_bytes(weight.shape) + 2 * _SCALE_BYTES * rows * format_.group_count(in_features)


# Exporter -> bytes of a weight in its file; the others add nothing to what a format stores.
EXPORTED_BYTES: dict[str, Callable[[Weight, Format], int]] = {
    "compressed-tensors": compressed_tensors_bytes,
    "compressed-tensors for vLLM": compressed_tensors_bytes,
    "mlx-lm": mlx_bytes,
}


def weight_bytes(weight: Weight, format_: Format, exporter: str | None = None) -> int:
    """Returns the bytes of a weight in a file.

    Args:
        weight: The weight.
        format_: Its format.
        exporter: Name of the exporter that writes the file; None for the packed file.
    """
    if exporter is None:
        return format_.storage_bytes(weight.shape) + further_header_bytes(weight, format_)
    count = EXPORTED_BYTES.get(exporter)
    return format_.storage_bytes(weight.shape) if count is None else count(weight, format_)


def _words(codes: int, bits: int) -> int:
    """Returns the bytes of a stream of codes that ends in a whole word."""
    return _WORD_BYTES * ceil(codes * bits / (8 * _WORD_BYTES))
