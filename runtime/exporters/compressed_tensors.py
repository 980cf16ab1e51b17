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

Where layers round what they read, the group says so (``input_activations``), with ``M.input_scale`` where the scale is
static. Weights of 8 bits a channel beside 8-bit activations are written as int8 numbers (int-quantized), which is what
engines multiply as integers:

    M.weight        int8 [out, in]          codes - 128
    M.weight_scale  float16 [out, 1]
"""

from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from runtime.activation_formats import UNQUANTIZED, ActivationFormat, find_activation_formats
from runtime.apply import FormatsByWeight
from runtime.exporters.hugging_face import checkpoint_parts, quantized_weights, unquantized_tensors, write_directory
from runtime.formats import Format, find_format
from runtime.loading import ReferenceModel
from runtime.packing import pack_codes, unpack_codes
from runtime.rendering import RenderingRule, encode_weight
from runtime.simulated_activations import ActivationScheme
from runtime.units import list_weights, read_weight

_WORD_BYTES = 4
_PACKED, _INTEGER_PRODUCT = "pack-quantized", "int-quantized"
_INTEGER_WEIGHTS = "int8_channel_sym"
_INTEGER_ACTIVATIONS = ("int8_token", "int8_tensor_static")


def export_compressed_tensors(
    reference: ReferenceModel,
    formats_by_weight: FormatsByWeight,
    directory: Path,
    *,
    quantizer: RenderingRule = "rtn",
    split_experts: bool = False,
    activations: ActivationScheme = MappingProxyType({}),
) -> None:
    """Writes the model as a Hugging Face directory of compressed tensors.

    Args:
        reference: The model.
        formats_by_weight: Weight name -> format name.
        directory: Where to.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        split_experts: Whether unquantized experts are written one by one, as vLLM reads them; transformers takes them
            as it has them in memory where the configuration speaks of quantization.
        activations: Linear layer -> format of its input and static scale.

    Raises:
        ValueError: If a format of activations cannot be written, or goes with weights that it cannot go with.
    """
    check_activations(formats_by_weight, activations, integer_products_alone=split_experts)
    tensors = unquantized_tensors(reference, formats_by_weight, split_experts=split_experts)
    weights = quantized_weights(reference, formats_by_weight)
    for weight in weights:
        format_ = find_format(formats_by_weight[weight.name])
        stored = encode_weight(weight, read_weight(reference.model, weight), format_, quantizer)
        for module, rows in checkpoint_parts(reference, weight.parameter, weight.expert_index):
            part = {name: tensor[rows] for name, tensor in stored.items()}
            if _is_integer_product(format_.name, activations.get(module)):
                compressed = {"weight": _signed_codes(part, format_, weight.shape[1]), "weight_scale": part["scale"]}
            else:
                compressed = compress(part, format_, (len(part["codes"]), weight.shape[1]))
            tensors |= {f"{module}.{name}": tensor for name, tensor in compressed.items()}
    tensors |= {f"{module}.input_scale": torch.tensor(s) for module, (_, s) in activations.items() if s is not None}
    changes: dict[str, Any] = {"dtype": "float16"}
    if weights:
        changes["quantization_config"] = quantization_config(reference, formats_by_weight, activations)
    write_directory(reference, directory, tensors, changes)


def quantization_config(
    reference: ReferenceModel,
    formats_by_weight: FormatsByWeight,
    activations: ActivationScheme = MappingProxyType({}),
) -> dict[str, Any]:
    """Returns the ``quantization_config`` of a plan: a group for formats that go together, disjoint targets."""
    targets: dict[tuple[str, str], list[str]] = {}
    ignored = []
    for name, weight in list_weights(reference.model).items():
        modules = [module for module, _ in checkpoint_parts(reference, weight.parameter, weight.expert_index)]
        if find_format(formats_by_weight[name]).unquantized:
            ignored += [*modules, *(alias.removesuffix(".weight") for alias in weight.aliases)]
        else:
            for module in modules:
                own = activations.get(module, (UNQUANTIZED, None))[0]
                targets.setdefault((formats_by_weight[name], own), []).append(module)
    groups = {
        f"group_{i}": {
            "targets": targets[name, own],
            "weights": weight_scheme(find_format(name)),
            "input_activations": activation_scheme(own),
            "output_activations": None,
            "format": _INTEGER_PRODUCT if _is_integer_product(name, (own, None)) else _PACKED,
        }
        for i, (name, own) in enumerate(sorted(targets))
    }
    kinds = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
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


def activation_scheme(format_name: str) -> dict[str, Any] | None:
    """Returns the ``input_activations`` of a group; None where they are unquantized."""
    [format_] = find_activation_formats([format_name])
    if not isinstance(format_, ActivationFormat):
        return None
    return {
        "num_bits": format_.bits,
        "type": "float" if format_.element else "int",
        "symmetric": True,
        "strategy": format_.scope,
        "dynamic": not format_.static,
    }


def check_activations(
    formats_by_weight: FormatsByWeight, activations: ActivationScheme, *, integer_products_alone: bool
) -> None:
    """Checks that activations can be written beside the weights that are multiplied with them.

    Args:
        formats_by_weight: Weight name -> format name.
        activations: Linear layer -> format of its input and static scale.
        integer_products_alone: Whether only 8-bit integers times 8-bit integers are run, as by vLLM.

    Raises:
        ValueError: If a format has a scale for each channel, or goes with weights that it cannot go with.
    """
    for module, (name, _) in activations.items():
        [format_] = find_activation_formats([name])
        weights = formats_by_weight.get(f"{module}.weight", UNQUANTIZED)
        if not isinstance(format_, ActivationFormat):
            continue
        integer_product = _is_integer_product(weights, (name, None))
        if (
            format_.scope == "channel"
            or find_format(weights).unquantized
            or (integer_products_alone and not integer_product)
        ):
            msg = (
                f"activations must go with the weights of their layer: got '{name}' with '{weights}' in '{module}'. "
                "Scales for each channel cannot be written, activations of unquantized weights stay unquantized"
                + (
                    f", and this engine runs {_INTEGER_WEIGHTS} with {', '.join(_INTEGER_ACTIVATIONS)} alone"
                    if integer_products_alone
                    else ""
                )
                + ". Measure with formats that go together (--formats, --activation-formats)."
            )
            raise ValueError(msg)


def _is_integer_product(weights: str, activations: tuple[str, Any] | None) -> bool:
    return weights == _INTEGER_WEIGHTS and activations is not None and activations[0] in _INTEGER_ACTIVATIONS


def _signed_codes(stored: dict[str, Tensor], format_: Format, in_features: int) -> Tensor:
    codes = unpack_codes(stored["codes"], format_.bits, in_features).to(torch.int16)
    return (codes - (1 << (format_.bits - 1))).to(torch.int8)


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
