"""Automatic choice: several quantizers are run on a weight, and the one with the least output error is kept.

All results of one format take the same bytes, so the least tr(D M D') wins; the first named of equals. The result
carries the winner's name. Time is the sum of theirs.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from runtime.formats import Format
from runtime.quantization import QuantizedWeight, dequantize
from runtime.quantizers.clipping import quantize_clipping, quantize_weighted_clipping
from runtime.quantizers.coordinate_descent import quantize_coordinate_descent
from runtime.quantizers.gptq import quantize_gptq
from runtime.quantizers.hqq import quantize_hqq
from runtime.quantizers.input_statistics import InputStatistics, require_statistics
from runtime.quantizers.learned_rounding import quantize_learned_rounding
from runtime.quantizers.rtn import quantize_rtn

Quantizer = Callable[[Tensor, Format, InputStatistics | None], QuantizedWeight]

SINGLE_QUANTIZERS: dict[str, Quantizer] = {
    "rtn": quantize_rtn,
    "clipping": quantize_clipping,
    "weighted_clipping": quantize_weighted_clipping,
    "hqq": quantize_hqq,
    "gptq": quantize_gptq,
    "coordinate_descent": quantize_coordinate_descent,
    "learned_rounding": quantize_learned_rounding,
}
# Learned rounding takes the time of all others together.
AUTOMATIC = ("rtn", "clipping", "hqq", "gptq", "coordinate_descent")


def quantize_automatic(
    weight: Tensor,
    format_: Format,
    statistics: InputStatistics | None = None,
    *,
    quantizers: Sequence[str] = AUTOMATIC,
) -> QuantizedWeight:
    """Returns the best of several results, with the name of its quantizer.

    Args:
        weight: [out_features, in_features], finite.
        format_: An integer format whose group size divides in_features.
        statistics: Of the weight's inputs.
        quantizers: Names in ``SINGLE_QUANTIZERS``.

    Raises:
        ValueError: If there are no statistics or they are of another input, a name is unknown or there is none, or a
            quantizer refuses the weight.
    """
    statistics = require_statistics(statistics, weight, "auto")
    unknown = [name for name in quantizers if name not in SINGLE_QUANTIZERS]
    if unknown or not quantizers:
        msg = f"quantizers must be among {', '.join(SINGLE_QUANTIZERS)}: got {list(quantizers)}. Correct the names."
        raise ValueError(msg)
    wide = weight.float()
    best: QuantizedWeight | None = None
    least = 0.0
    for name in quantizers:
        quantized = SINGLE_QUANTIZERS[name](weight, format_, statistics)
        error = statistics.output_error(dequantize(quantized).sub_(wide))
        if best is None or error < least:
            best, least = replace(quantized, quantizer=name), error
    assert best is not None
    return best
