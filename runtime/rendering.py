"""How candidates are rendered: a quantizer by name, with the statistics of all weights' inputs where it needs them.

A quantizer that reads the weight alone is its name and nothing more; so both are accepted wherever candidates are
rendered, and a name goes on meaning what it meant.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from runtime.codecs import CODECS
from runtime.codecs.integer import pack_quantized
from runtime.formats import Format
from runtime.quantization import QuantizedWeight, dequantize
from runtime.quantizers import QUANTIZERS, STATISTICAL, InputStatistics, quantize
from runtime.rendered_files import RenderedFiles
from runtime.units import Weight


@dataclass(frozen=True, kw_only=True, eq=False)
class Rendering:
    """A quantizer with what it knows about the inputs of a model's weights.

    Args:
        quantizer: Name in ``QUANTIZERS``.
        statistics: Weight name -> statistics of its inputs.
        files: Where what was rendered with these statistics is kept; None to render it each time.

    Raises:
        ValueError: If the quantizer is unknown.
    """

    quantizer: str
    statistics: Mapping[str, InputStatistics]
    files: RenderedFiles | None = None

    def __post_init__(self) -> None:
        if self.quantizer not in QUANTIZERS:
            msg = f"quantizer must be among {', '.join(QUANTIZERS)}: got '{self.quantizer}'. Correct the name."
            raise ValueError(msg)


# A bare name is that of a quantizer that needs no statistics.
RenderingRule = str | Rendering


def render(
    values: Tensor, format_: Format, quantizer: str = "rtn", *, statistics: InputStatistics | None = None
) -> Tensor:
    """Returns the float32 values [out_features, in_features] as they will be read back from ``format_``.

    Args:
        values: Finite.
        format_: The format.
        quantizer: Name in ``QUANTIZERS``; formats that are not integers are rendered by their own encoder.
        statistics: Of the weight's inputs; needed by the quantizers in ``STATISTICAL``.

    Raises:
        ValueError: If the quantizer is unknown, lacks statistics that it needs, or the weight cannot be stored.
    """
    if format_.kind == "int":
        # What packing and unpacking would give, without either.
        return dequantize(quantize(values, format_, quantizer, statistics=statistics))
    shape = (values.shape[0], values.shape[1])
    return CODECS[format_.kind].decode(encode(values, format_, quantizer, statistics=statistics), format_, shape, None)


def encode(
    values: Tensor, format_: Format, quantizer: str = "rtn", *, statistics: InputStatistics | None = None
) -> dict[str, Tensor]:
    """Returns the tensors that the values are stored as, by name; arguments and errors as of ``render``."""
    if format_.kind == "int":
        return pack_quantized(quantize(values, format_, quantizer, statistics=statistics))
    importance = None
    if statistics is not None:
        statistics.check_fits(values)
        importance = statistics.hessian().diagonal()
    return CODECS[format_.kind].encode(values.to(torch.float32), format_, importance)


def render_weight(weight: Weight, values: Tensor, format_: Format, rule: RenderingRule) -> Tensor:
    """Returns the float32 values [out_features, in_features] of a weight as they will be read back from a format.

    Args:
        weight: The weight.
        values: Its values [out_features, in_features].
        format_: The format.
        rule: Name in ``QUANTIZERS``, or a ``Rendering``.

    Raises:
        ValueError: If the quantizer is unknown, lacks statistics that it needs, or the weight cannot be stored.
    """
    if format_.kind == "int":
        return dequantize(_quantize_weight(weight, values, format_, rule))
    return render(values, format_, quantizer_name(rule), statistics=statistics_of(weight, format_, rule))


def encode_weight(weight: Weight, values: Tensor, format_: Format, rule: RenderingRule) -> dict[str, Tensor]:
    """Returns the tensors that a weight is stored as, by name; arguments and errors as of ``render_weight``."""
    if format_.kind == "int":
        return pack_quantized(_quantize_weight(weight, values, format_, rule))
    return encode(values, format_, quantizer_name(rule), statistics=statistics_of(weight, format_, rule))


def _quantize_weight(weight: Weight, values: Tensor, format_: Format, rule: RenderingRule) -> QuantizedWeight:
    quantizer, statistics = quantizer_name(rule), statistics_of(weight, format_, rule)
    if statistics is None or isinstance(rule, str) or rule.files is None:
        return quantize(values, format_, quantizer, statistics=statistics)
    make = partial(quantize, values, format_, quantizer, statistics=statistics)
    return rule.files.read_or_make(weight.name, values, format_, make)


def quantizer_name(rule: RenderingRule) -> str:
    """Returns the name of a rule's quantizer."""
    return rule if isinstance(rule, str) else rule.quantizer


def statistics_of(weight: Weight, format_: Format, rule: RenderingRule) -> InputStatistics | None:
    """Returns what a rule knows about the inputs of a weight; None where it is rendered from the weight alone.

    Raises:
        ValueError: If the quantizer needs statistics and the rule has none of this weight.
    """
    if quantizer_name(rule) not in STATISTICAL or not CODECS[format_.kind].reads_importance:
        return None
    known = {} if isinstance(rule, str) else rule.statistics
    if weight.name not in known:
        msg = (
            f"quantizer '{quantizer_name(rule)}' needs input statistics of every weight: got none for '{weight.name}'. "
            "Pass a Rendering with statistics collected on this model."
        )
        raise ValueError(msg)
    return known[weight.name]
