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
from runtime.quantizers.gptq import round_compensated
from runtime.rendered_files import RenderedFiles
from runtime.units import Weight


@dataclass(frozen=True, kw_only=True, eq=False)
class Rendering:
    """A quantizer with what it knows about the inputs of a model's weights.

    Args:
        quantizer: Name in ``QUANTIZERS``.
        statistics: Weight name -> statistics of its inputs; none for a quantizer that reads the weight alone.
        files: Where what takes long is kept, rendered with these statistics or by the search of a format's own encoder;
            None to render it each time.

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


# Quantizers under which formats of other kinds get their codes by GPTQ, on the scales of their own encoder.
COMPENSATING = frozenset({"gptq", "auto"})

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
    wide = values.to(torch.float32)
    tensors = CODECS[format_.kind].encode(wide, format_, importance)
    if statistics is None or quantizer not in COMPENSATING:
        return tensors
    return _compensate(wide, format_, statistics, tensors, always=quantizer == "gptq")


def _compensate(
    values: Tensor, format_: Format, statistics: InputStatistics, tensors: dict[str, Tensor], *, always: bool
) -> dict[str, Tensor]:
    """Returns the stored tensors with GPTQ's codes on the same scales; else only where their output error is less."""
    codec, shape = CODECS[format_.kind], (values.shape[0], values.shape[1])
    if codec.grid is None:
        return tensors
    grid = codec.grid(tensors, format_, shape)
    compensated = grid.with_codes(round_compensated(values, statistics, grid.round_column))
    if always:
        return compensated
    nearest, moved = (codec.decode(each, format_, shape, None).sub_(values) for each in (tensors, compensated))
    return compensated if statistics.output_error(moved) < statistics.output_error(nearest) else tensors


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
    return CODECS[format_.kind].decode(encode_weight(weight, values, format_, rule), format_, weight.shape, None)


def encode_weight(weight: Weight, values: Tensor, format_: Format, rule: RenderingRule) -> dict[str, Tensor]:
    """Returns the tensors that a weight is stored as, by name; arguments and errors as of ``render_weight``."""
    if format_.kind == "int":
        return pack_quantized(_quantize_weight(weight, values, format_, rule))
    make = partial(encode, values, format_, quantizer_name(rule), statistics=statistics_of(weight, format_, rule))
    if isinstance(rule, str) or rule.files is None or format_.unquantized:
        return make()
    return rule.files.read_or_make_tensors(weight.name, values, format_, make)


def _quantize_weight(weight: Weight, values: Tensor, format_: Format, rule: RenderingRule) -> QuantizedWeight:
    quantizer, statistics = quantizer_name(rule), statistics_of(weight, format_, rule)
    # Rounding to nearest is as quick as reading what it gave.
    if isinstance(rule, str) or rule.files is None or quantizer == "rtn":
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
