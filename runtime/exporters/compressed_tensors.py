"""compressed-tensors, pack-quantized: what transformers and vLLM load.

A weight M [out, in] of b bits is stored as

    M.weight_packed      int32 [out, ceil(in * b / 32)]     codes as one little-endian bit stream a row
    M.weight_scale       float16 [out, groups]
    M.weight_zero_point  int32 [ceil(out * b / 32), groups] the same stream down the columns, asymmetric formats only
    M.weight_shape       int64 [2]

and a code c stands for the integer c - 2^(b-1), as ours does in symmetric formats; a zero point is shifted alike, so
codes and zero points are written unchanged. Streams are dense, as compressed-tensors reads them from version 0.18 on;
for 2, 4 and 8 bits older versions read the same.

Each format is a group of the configuration whose targets are the full names of its modules: no pattern of one group
can match a module of another, so that every reader resolves a module alike, in whatever order it looks.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.apply import FormatsByWeight
from runtime.exporters.hugging_face import checkpoint_parts, quantized_weights, unquantized_tensors, write_directory
from runtime.formats import Format, find_format
from runtime.loading import ReferenceModel
from runtime.packing import pack_codes, unpack_codes
from runtime.rendering import RenderingRule, encode_weight
from runtime.units import list_weights, read_weight

_WORD_BYTES = 4


def export_compressed_tensors(
    reference: ReferenceModel,
    formats_by_weight: FormatsByWeight,
    directory: Path,
    *,
    quantizer: RenderingRule = "rtn",
    split_experts: bool = False,
) -> None:
    """Writes the model as a Hugging Face directory of compressed tensors.

    Args:
        reference: The model.
        formats_by_weight: Weight name -> format name.
        directory: Where to.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        split_experts: Whether unquantized experts are written one by one, as vLLM reads them; transformers takes them
            as it has them in memory where the configuration speaks of quantization.
    """
    tensors = unquantized_tensors(reference, formats_by_weight, split_experts=split_experts)
    weights = quantized_weights(reference, formats_by_weight)
    for weight in weights:
        format_ = find_format(formats_by_weight[weight.name])
        stored = encode_weight(weight, read_weight(reference.model, weight), format_, quantizer)
        for module, rows in checkpoint_parts(reference, weight.parameter, weight.expert_index):
            part = {name: tensor[rows] for name, tensor in stored.items()}
            compressed = compress(part, format_, (len(part["codes"]), weight.shape[1]))
            tensors |= {f"{module}.{name}": tensor for name, tensor in compressed.items()}
    changes: dict[str, Any] = {"dtype": "float16"}
    if weights:
        changes["quantization_config"] = quantization_config(reference, formats_by_weight)
    write_directory(reference, directory, tensors, changes)


def quantization_config(reference: ReferenceModel, formats_by_weight: FormatsByWeight) -> dict[str, Any]:
    """Returns the ``quantization_config`` of a plan: one group a format, explicit disjoint targets."""
    targets: dict[str, list[str]] = {}
    ignored = []
    for name, weight in list_weights(reference.model).items():
        modules = [module for module, _ in checkpoint_parts(reference, weight.parameter, weight.expert_index)]
        if find_format(formats_by_weight[name]).unquantized:
            ignored += [*modules, *(alias.removesuffix(".weight") for alias in weight.aliases)]
        else:
            targets.setdefault(formats_by_weight[name], []).extend(modules)
    groups = {
        f"group_{i}": {
            "targets": targets[name],
            "weights": weight_scheme(find_format(name)),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for i, name in enumerate(sorted(targets))
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        # The first version that packs every width densely.
        "version": "0.18.0",
        "ignore": ignored,
        "config_groups": groups,
    }


def weight_scheme(format_: Format) -> dict[str, Any]:
    """Returns the ``weights`` of a group: the format in the library's words."""
    by_group = format_.group_size is not None
    return {
        "num_bits": format_.bits,
        "type": "int",
        "symmetric": format_.symmetric,
        "strategy": "group" if by_group else "channel",
        **({"group_size": format_.group_size} if by_group else {}),
        "dynamic": False,
    }


def compress(stored: dict[str, Tensor], format_: Format, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Returns the tensors of a weight as the library stores them, by their last names.

    Args:
        stored: Tensors of ``format_.stored_tensors``.
        format_: An integer format with float16 scales.
        shape: (out_features, in_features).
    """
    tensors = {
        "weight_packed": _as_words(stored["codes"]),
        "weight_scale": stored["scale"].contiguous(),
        "weight_shape": torch.tensor(shape, dtype=torch.int64),
    }
    if not format_.symmetric:
        zero_points = unpack_codes(stored["zero_point"], format_.bits, stored["scale"].shape[1])
        columns = pack_codes(zero_points.T.contiguous(), format_.bits)
        tensors["weight_zero_point"] = _as_words(columns).T.contiguous()
    return tensors


def _as_words(octets: Tensor) -> Tensor:
    """Returns rows of bytes as rows of 32-bit words, the last one filled with zeros."""
    padded = torch.nn.functional.pad(octets, (0, -octets.shape[1] % _WORD_BYTES))
    return padded.flatten().view(torch.int32).view(len(octets), -1)
