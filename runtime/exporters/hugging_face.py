"""What all exporters to a Hugging Face directory share: tokenizer, configuration, tensors of the unquantized rest."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.apply import FormatsByWeight
from runtime.checkpoint import (
    CHECKPOINT_FILE,
    distinct_tensors,
    exact_dtype,
    most_entry_bytes,
    rest_bytes,
    write_tensors,
)
from runtime.files import write_text
from runtime.formats import Format, find_format
from runtime.loading import ReferenceModel
from runtime.units import Weight, list_weights

# No format becomes more tensors of a module than these, with names that end so.
_MOST_TENSORS, _LONGEST_SUFFIX = 4, ".weight_zero_point"
_METADATA = {"format": "pt"}
# model_type -> what its checkpoints call otherwise than transformers 5 does.
_CHECKPOINT_NAMES = {
    "mixtral": {".mlp.": ".block_sparse_moe.", ".gate_proj": ".w1", ".down_proj": ".w2", ".up_proj": ".w3"},
}


def module_name(weight: Weight) -> str:
    """Returns the name of the module that holds a weight."""
    return weight.parameter.removesuffix(".weight")


def checkpoint_parts(reference: ReferenceModel, parameter: str, expert: int | None) -> list[tuple[str, slice]]:
    """Returns the modules a parameter becomes in a checkpoint, each with the rows [first, last) that it has of it.

    In checkpoints every expert is a module of its own, and its gate and up projection are two; transformers 5 joins
    them when it loads, other engines read them as they are.

    Args:
        reference: The model.
        parameter: Name of the parameter.
        expert: Index of the expert, or None for a parameter that is no stack of experts.
    """
    stem, _, role = parameter.removesuffix(".weight").rpartition(".")
    halves = {role: slice(None)}
    if expert is not None:
        stem = f"{stem}.{expert}"
        if role == "gate_up_proj":
            half = reference.model.get_parameter(parameter).shape[1] // 2
            halves = {"gate_proj": slice(0, half), "up_proj": slice(half, None)}
    names = {part: f"{stem}.{part}" if stem else part for part in halves}
    return [(_checkpoint_name(reference, names[part]), rows) for part, rows in halves.items()]


def _checkpoint_name(reference: ReferenceModel, name: str) -> str:
    for ours, theirs in _CHECKPOINT_NAMES.get(reference.model.config.model_type, {}).items():
        name = name.replace(ours, theirs)
    return name


def list_modules(reference: ReferenceModel, formats_by_weight: FormatsByWeight) -> list[tuple[str, Format]]:
    """Returns the name and the format of every module that holds a weight, a tied one under its first name."""
    return [
        (module_name(weight), find_format(formats_by_weight[name]))
        for name, weight in list_weights(reference.model).items()
        if weight.expert_index is None
    ]


def quantized_weights(reference: ReferenceModel, formats_by_weight: FormatsByWeight) -> list[Weight]:
    """Returns the weights that take a quantized format, in model order."""
    return [
        weight
        for name, weight in list_weights(reference.model, routers=True).items()
        if name in formats_by_weight and not find_format(formats_by_weight[name]).unquantized
    ]


def unquantized_tensors(
    reference: ReferenceModel, formats_by_weight: FormatsByWeight, *, split_experts: bool = False
) -> dict[str, Tensor]:
    """Returns the tensors of everything that takes no quantized format, each in the type it is stored in.

    Args:
        reference: The model.
        formats_by_weight: Weight name -> format name.
        split_experts: Whether experts are written one by one, as checkpoints have them, or as transformers 5 keeps
            them in memory, one parameter a projection. Those that share it with a quantized one always are.
    """
    quantized = {weight.name for weight in quantized_weights(reference, formats_by_weight)}
    experts: dict[str, list[str]] = {}
    for weight in list_weights(reference.model).values():
        if weight.expert_index is not None:
            experts.setdefault(weight.parameter, []).append(weight.name)
    tensors: dict[str, Tensor] = {}
    for name, tensor in distinct_tensors(reference.model).items():
        names = experts.get(name, [])
        if names and (split_experts or quantized.intersection(names)):
            for i, expert in enumerate(names):
                if expert not in quantized:
                    values = _stored(tensor[i], formats_by_weight.get(expert))
                    parts = checkpoint_parts(reference, name, i)
                    tensors |= {f"{module}.weight": values[rows].contiguous() for module, rows in parts}
        elif name not in quantized:
            written = _checkpoint_name(reference, name) if split_experts else name
            tensors[written] = _stored(tensor, formats_by_weight.get(names[0] if names else name))
    return tensors


def _stored(tensor: Tensor, format_name: str | None) -> Tensor:
    dtype = exact_dtype(tensor) if format_name is None else getattr(torch, find_format(format_name).element)
    return tensor.detach().to(dtype).contiguous()


def hugging_face_fixed_bytes(reference: ReferenceModel, *, routers: bool = False) -> int:
    """Returns the bytes of ``model.safetensors`` that no choice changes: the unquantized rest and the padded header.

    Args:
        reference: The model.
        routers: Whether routers take formats too.
    """
    rest = rest_bytes(reference.model, routers=routers, residency=reference.residency)
    return rest + _header_bytes(reference)


def _header_bytes(reference: ReferenceModel) -> int:
    """Returns the length that the header is padded to, whatever the formats."""
    modules = {
        module
        for weight in list_weights(reference.model, routers=True).values()
        for module, _ in checkpoint_parts(reference, weight.parameter, weight.expert_index)
    }
    total = sum(_MOST_TENSORS * most_entry_bytes(module + _LONGEST_SUFFIX, 2) for module in modules)
    for name, tensor in distinct_tensors(reference.model).items():
        longest = max(name, _checkpoint_name(reference, name), key=len)
        total += most_entry_bytes(longest, tensor.ndim)
    return -(-(total + most_entry_bytes(json.dumps(_METADATA), 0)) // 8) * 8


def write_directory(
    reference: ReferenceModel, directory: Path, tensors: Mapping[str, Tensor], changes: Mapping[str, Any]
) -> None:
    """Writes weights, configuration and tokenizer; the weights' file is as long as its bytes are counted beforehand.

    Args:
        reference: The model.
        directory: Where to.
        tensors: Name -> tensor.
        changes: What differs from the reference model's configuration.
    """
    config = reference.model.config.to_dict()
    config.pop("quantization_config", None)
    write_text(directory / "config.json", json.dumps({**config, **changes}, indent=2, default=str) + "\n")
    reference.tokenizer.save_pretrained(directory)
    write_tensors(tensors, directory / CHECKPOINT_FILE, _METADATA, header_bytes=_header_bytes(reference))
