"""Quantizers: rules that choose codes, scales and zero points for one weight.

Every quantizer is a function ``(weight [out_features, in_features], format, statistics or None) -> QuantizedWeight``.
Those in ``STATISTICAL`` need the statistics; ``clipping`` weights its error by them where they are given. Whose
statistics are of text and whose are not, ``sensitivity.weight_inputs`` decides by ``TEXTLESS``.

They work on the grid of integer formats. A format of any other kind is rendered by its own encoder
(``runtime/codecs/``), whatever quantizer is asked for; a quantizer in ``STATISTICAL`` hands it the importance of the
columns. Under ``gptq``, and under ``auto`` where it is better, the encoder chooses the scales and GPTQ the codes.
``runtime/rendering.py`` makes the difference.
"""

from dataclasses import replace

from torch import Tensor

from runtime.formats import Format
from runtime.quantization import QuantizedWeight
from runtime.quantizers.activation_scaling import ActivationScale, find_activation_scale, scale_inputs
from runtime.quantizers.automatic import SINGLE_QUANTIZERS, Quantizer, quantize_automatic
from runtime.quantizers.clipping import quantize_drawn_clipping
from runtime.quantizers.input_statistics import InputStatistics

QUANTIZERS: dict[str, Quantizer] = {
    **SINGLE_QUANTIZERS,
    "drawn_clipping": quantize_drawn_clipping,
    "auto": quantize_automatic,
}
# Their statistics are of tokens drawn from the vocabulary, whatever the calibration text is.
TEXTLESS = frozenset({"drawn_clipping"})
STATISTICAL = TEXTLESS | {"weighted_clipping", "gptq", "coordinate_descent", "learned_rounding", "auto"}

__all__ = [
    "QUANTIZERS",
    "STATISTICAL",
    "TEXTLESS",
    "ActivationScale",
    "InputStatistics",
    "Quantizer",
    "find_activation_scale",
    "quantize",
    "scale_inputs",
]


def quantize(
    weight: Tensor, format_: Format, quantizer: str = "rtn", *, statistics: InputStatistics | None = None
) -> QuantizedWeight:
    """Returns the weight [out_features, in_features] quantized by a named quantizer.

    Args:
        weight: Finite.
        format_: An integer format.
        quantizer: Name in ``QUANTIZERS``.
        statistics: Of the weight's inputs; needed by those in ``STATISTICAL``.

    Raises:
        ValueError: If the quantizer is unknown, lacks statistics that it needs, or refuses the weight, or the format
            is not an integer format.
    """
    if format_.kind != "int":
        msg = f"quantizers work on integer formats: got format '{format_.name}' of kind '{format_.kind}'. Render it."
        raise ValueError(msg)
    if quantizer not in QUANTIZERS:
        msg = f"quantizer must be a known name: got '{quantizer}'. Known quantizers: {', '.join(QUANTIZERS)}."
        raise ValueError(msg)
    quantized = QUANTIZERS[quantizer](weight, format_, statistics)
    return quantized if quantized.quantizer else replace(quantized, quantizer=quantizer)
