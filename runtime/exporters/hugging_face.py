"""What all exporters to a Hugging Face directory share: tokenizer, configuration, tensors of the unquantized rest."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime.apply import FormatsByWeight
from runtime.checkpoint import CHECKPOINT_FILE, distinct_tensors, exact_dtype
from runtime.files import write_text
from runtime.formats import Format, find_format
from runtime.loading import ReferenceModel
from runtime.units import Weight, list_weights


def module_name(weight: Weight) -> str:
    """Returns the name of the module that holds a weight."""
    return weight.parameter.removesuffix(".weight")


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


def unquantized_tensors(reference: ReferenceModel, formats_by_weight: FormatsByWeight) -> dict[str, Tensor]:
    """Returns the tensors of everything that takes no quantized format, each in the type it is stored in."""
    quantized = {weight.parameter for weight in quantized_weights(reference, formats_by_weight)}
    tensors = {}
    for name, tensor in distinct_tensors(reference.model).items():
        if name in quantized:
            continue
        chosen = formats_by_weight.get(name)
        dtype = exact_dtype(tensor) if chosen is None else getattr(torch, find_format(chosen).element)
        tensors[name] = tensor.detach().to(dtype).contiguous()
    return tensors


def write_directory(
    reference: ReferenceModel, directory: Path, tensors: Mapping[str, Tensor], changes: Mapping[str, Any]
) -> None:
    """Writes weights, configuration and tokenizer.

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
    save_file(dict(tensors), directory / CHECKPOINT_FILE, metadata={"format": "pt"})
