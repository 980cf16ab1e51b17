"""MLX-LM: weights quantized as MLX reads them, and the entry of each module in its configuration.

MLX reads ``scale * code + bias`` with codes as one little-endian bit stream a row, as ours are. The bias is
-scale * zero_point: exact in float16 for symmetric formats, whose zero point is a power of two, and rounded to it for
the others, which moves a weight by at most 2^-11 of |scale * zero_point|. Every module is listed by its own name, with
``false`` where it is not quantized: what MLX does not find there it would take the default for.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.apply import FormatsByWeight
from runtime.exporters.hugging_face import (
    list_modules,
    module_name,
    quantized_weights,
    unquantized_tensors,
    write_directory,
)
from runtime.formats import Format, find_format
from runtime.loading import ReferenceModel
from runtime.packing import unpack_codes
from runtime.rendering import RenderingRule, encode_weight
from runtime.units import read_weight


def export_mlx(
    reference: ReferenceModel, formats_by_weight: FormatsByWeight, directory: Path, *, quantizer: RenderingRule = "rtn"
) -> None:
    """Writes a directory that ``mlx_lm.load`` reads; arguments as of ``export``."""
    tensors = unquantized_tensors(reference, formats_by_weight)
    for weight in quantized_weights(reference, formats_by_weight):
        format_ = find_format(formats_by_weight[weight.name])
        stored = encode_weight(weight, read_weight(reference.model, weight), format_, quantizer)
        tensors |= {f"{module_name(weight)}.{name}": t for name, t in affine_tensors(stored, format_).items()}
    quantization = mlx_quantization(reference, formats_by_weight)
    changes = {**rope_settings(reference), **({"quantization": quantization} if quantization else {})}
    write_directory(reference, directory, tensors, changes)


def rope_settings(reference: ReferenceModel) -> dict[str, Any]:
    """Returns the rotary settings under the names that MLX-LM reads.

    transformers 5 keeps them in ``rope_parameters``, where most of MLX-LM's models do not look: they would take their
    own default base without a word.
    """
    parameters = dict(getattr(reference.model.config, "rope_parameters", None) or {})
    theta = parameters.pop("rope_theta", None)
    settings: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
    return settings if parameters.get("rope_type", "default") == "default" else {**settings, "rope_scaling": parameters}


def mlx_quantization(reference: ReferenceModel, formats_by_weight: FormatsByWeight) -> dict[str, Any]:
    """Returns the entry ``quantization`` of a plan's configuration; empty when nothing is quantized."""
    entries = {
        name: None if format_.unquantized else {"group_size": format_.group_size, "bits": format_.bits}
        for name, format_ in list_modules(reference, formats_by_weight)
    }
    quantized = [entry for entry in entries.values() if entry]
    if not quantized:
        return {}
    return {**quantized[0], "mode": "affine", **{name: entry or False for name, entry in entries.items()}}


def affine_tensors(stored: dict[str, Tensor], format_: Format) -> dict[str, Tensor]:
    """Returns ``weight`` [out, in * bits / 32] uint32, ``scales`` and ``biases`` [out, groups] float16 of a weight.

    Args:
        stored: Tensors of ``format_.stored_tensors``.
        format_: An integer format whose groups are a multiple of 32 weights, so that rows fill whole words.
    """
    scale = stored["scale"]
    zero_point: Tensor | float = float(1 << (format_.bits - 1))
    if not format_.symmetric:
        zero_point = unpack_codes(stored["zero_point"], format_.bits, scale.shape[1]).to(torch.float32)
    biases = (-scale.to(torch.float32) * zero_point).to(torch.float16)
    return {"weight": stored["codes"].contiguous().view(torch.uint32), "scales": scale.contiguous(), "biases": biases}
