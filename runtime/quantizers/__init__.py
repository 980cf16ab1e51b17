"""Quantizers: rules that choose codes, scales and zero points for one weight.

Every quantizer is a function ``(weight [out_features, in_features], format) -> QuantizedWeight``.
"""

from collections.abc import Callable

from torch import Tensor

from runtime.formats import Format
from runtime.quantization import QuantizedWeight, dequantize, round_to_float
from runtime.quantizers.rtn import quantize_rtn

QUANTIZERS: dict[str, Callable[[Tensor, Format], QuantizedWeight]] = {"rtn": quantize_rtn}

__all__ = ["QUANTIZERS", "quantize", "render"]


def quantize(weight: Tensor, format_: Format, quantizer: str = "rtn") -> QuantizedWeight:
    """Returns the weight [out_features, in_features] quantized by a named quantizer.

    Raises:
        ValueError: If the quantizer is unknown.
    """
    if quantizer not in QUANTIZERS:
        msg = f"quantizer must be a known name: got '{quantizer}'. Known quantizers: {', '.join(sorted(QUANTIZERS))}."
        raise ValueError(msg)
    return QUANTIZERS[quantizer](weight, format_)


def render(weight: Tensor, format_: Format, quantizer: str = "rtn") -> Tensor:
    """Returns the float32 weight [out_features, in_features] as it will be read back from ``format_``."""
    if format_.kind == "float":
        return round_to_float(weight, format_)
    return dequantize(quantize(weight, format_, quantizer))
