"""Round-to-nearest: the range of each group sets its scale, and every weight goes to the nearest code.

Asymmetric: the range is stretched to contain zero, scale = (max - min) / (2^b - 1),
zero_point = round(-min / scale), code = clamp(round(w / scale) + zero_point, 0, 2^b - 1).
Symmetric: scale = max|w| / ((2^b - 1) / 2), code = clamp(round(w / scale), -2^(b-1), 2^(b-1) - 1) + 2^(b-1).

The scale is rounded *up* to float16, so that no weight falls outside the codes and
|w - dequantized(w)| <= scale / 2 holds for every weight (up to float32 rounding). A scale that is a float16
already stays, so an asymmetric group that lies on its own grid, ends included, is reproduced. Linear time.
"""

from torch import Tensor

from runtime.formats import Format
from runtime.quantization import QuantizedWeight
from runtime.quantizers.grid import find_grid
from runtime.quantizers.input_statistics import InputStatistics


def quantize_rtn(weight: Tensor, format_: Format, statistics: InputStatistics | None = None) -> QuantizedWeight:
    """Returns the weight rounded to nearest in an integer format.

    Args:
        weight: [out_features, in_features], finite.
        format_: An integer format whose group size divides in_features.
        statistics: Not read.

    Raises:
        ValueError: If the group size does not divide the row, or a scale is not a finite float16.
    """
    grid = find_grid(weight, format_)
    return grid.quantized(grid.codes_of(weight))
