"""Recipes that name modules one by one: configurations of MLX-LM, torchao and ModelOpt, the tensors of a GGUF file.

    mlx-lm    config.json, ``quantization``: the default, and for a module its own setting or ``false``
    torchao   an ``FqnToConfig``, by itself or in config.json; names before patterns before ``_default``
    modelopt  hf_quant_config.json, ``quantized_layers``
    gguf      the types of the tensors that are there

MLX's affine groups have a scale and a bias: what is read is a format with zero points, also where a plan had none.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.formats import FORMATS
from runtime.units import Weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig

UNQUANTIZED = "bf16"
GGML_NAMES = {"f16": "fp16", "bf16": "bf16"}
Scheme = Mapping[str, Any]


def find_integer(bits: int, group_size: int | None, *, symmetric: bool, weight: str) -> str:
    """Returns the name of an integer format.

    Args:
        bits: Width of a code.
        group_size: Weights of a group; None or -1 for whole rows.
        symmetric: Whether there is no zero point.
        weight: Name of the weight, for the error.

    Raises:
        ValueError: If there is no such format.
    """
    group = "channel" if group_size in (None, -1) else f"g{group_size}"
    name = f"int{bits}_{group}{'_sym' if symmetric else ''}"
    if name not in FORMATS:
        msg = f"a recipe's format must be among ours: got bits={bits}, group_size={group_size} for '{weight}'."
        raise ValueError(msg)
    return name


def read_mlx(document: Scheme, weights: Mapping[str, Weight]) -> dict[str, str]:
    """Returns weight name -> format name of an MLX-LM configuration."""
    settings: Scheme = document.get("quantization", document)
    formats = {}
    for name, weight in weights.items():
        # What is not named has the default, if its row is a multiple of the default group.
        own = settings.get(_module(weight), weight.shape[1] % settings["group_size"] == 0)
        formats[name] = UNQUANTIZED
        if own and weight.expert_index is None:
            setting = {**settings, **(own if isinstance(own, Mapping) else {})}
            if setting.get("mode", "affine") != "affine":
                msg = (
                    f"a recipe of MLX must be affine: got mode='{setting['mode']}' for '{name}'. Price another recipe."
                )
                raise ValueError(msg)
            formats[name] = find_integer(setting["bits"], setting["group_size"], symmetric=False, weight=name)
    return formats


def find_torchao(document: Scheme) -> Scheme | None:
    """Returns module or pattern -> configuration of a torchao configuration, or None where it is none."""
    found = document.get("quant_type", {}).get("default", document)
    if isinstance(found, Mapping) and found.get("_type") in ("FqnToConfig", "ModuleFqnToConfig"):
        data = found["_data"]
        modules: Scheme = data.get("fqn_to_config", data.get("module_fqn_to_config", {}))
        return modules
    return None


def read_torchao(document: Scheme, weights: Mapping[str, Weight]) -> dict[str, str]:
    """Returns weight name -> format name of an ``FqnToConfig``.

    Raises:
        ValueError: If patterns that match a module disagree, whose order saving changes, or a configuration is not of
            integer weights.
    """
    modules = find_torchao(document) or {}
    patterns = {key[3:]: config for key, config in modules.items() if key.startswith("re:")}
    formats = {}
    for name, weight in weights.items():
        module = _module(weight)
        if module in modules:
            formats[name] = _torchao_format(modules[module], name)
            continue
        found = {_torchao_format(config, name) for p, config in patterns.items() if re.fullmatch(p, module)}
        if len(found) > 1:
            msg = (
                f"a module must match patterns of one format: got {', '.join(sorted(found))} for '{module}', of which "
                "the first counts, and saving sorts them. Name the module."
            )
            raise ValueError(msg)
        default = modules.get("_default") if weight.kind == "linear" else None
        formats[name] = found.pop() if found else _torchao_format(default, name)
    return formats


def _torchao_format(config: Scheme | None, weight: str) -> str:
    if config is None:
        return UNQUANTIZED
    if config.get("_type") != "IntxWeightOnlyConfig":
        msg = (
            f"a recipe of torchao must round weights to integers: got {config.get('_type')} for '{weight}'. Use "
            "IntxWeightOnlyConfig."
        )
        raise ValueError(msg)
    data = config["_data"]
    bits = int(data["weight_dtype"]["_data"].removeprefix("int"))
    symmetric = data.get("mapping_type", {}).get("_data", "SYMMETRIC") == "SYMMETRIC"
    return find_integer(bits, data["granularity"]["_data"].get("group_size"), symmetric=symmetric, weight=weight)


def read_modelopt(document: Scheme, weights: Mapping[str, Weight]) -> dict[str, str]:
    """Returns weight name -> format name of a ModelOpt configuration.

    Raises:
        ValueError: If an algorithm is none of weights alone.
    """
    from runtime.exporters.modelopt import ALGORITHMS

    layers: Scheme = document.get("quantization", document)["quantized_layers"]
    known = {algorithm["quant_algo"]: name for name, algorithm in ALGORITHMS.items()}
    formats = {}
    for name, weight in weights.items():
        algorithm = layers.get(_module(weight), {}).get("quant_algo")
        if algorithm is not None and algorithm not in known:
            msg = (
                f"a recipe of ModelOpt must store weights as {', '.join(known)}: got '{algorithm}' for '{name}', which "
                "is no format here."
            )
            raise ValueError(msg)
        formats[name] = known[algorithm] if algorithm else UNQUANTIZED
    return formats


def read_gguf(path: Path, weights: Mapping[str, Weight], config: "PretrainedConfig") -> dict[str, str]:
    """Returns weight name -> format name of a GGUF file.

    Raises:
        ValueError: If a weight has no tensor in the file, or one of a type that there is not among the formats.
    """
    from gguf import GGUFReader

    from runtime.exporters.llama_cpp import find_name_map, list_parts

    types = {tensor.name: tensor.tensor_type.name.lower() for tensor in GGUFReader(path).tensors}
    names = find_name_map(config)
    formats = {}
    for name, weight in weights.items():
        found = sorted({types.get(tensor, "none") for tensor, _ in list_parts(weight, names)})
        format_name = GGML_NAMES.get(found[0], found[0])
        if len(found) > 1 or format_name not in FORMATS:
            msg = (
                f"a weight must have one type that is among the formats: got {', '.join(found)} for '{name}' in "
                f"'{path}'. Price the file of a model with the same tensors."
            )
            raise ValueError(msg)
        formats[name] = format_name
    return formats


def _module(weight: Weight) -> str:
    return weight.parameter.removesuffix(".weight")
