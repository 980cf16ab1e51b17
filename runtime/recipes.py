"""Recipes: formats read back from what people write by hand or what other tools made.

    tensor types        NAME=TYPE, separated by white space, as for llama-quantize --tensor-type-file
    gptqmodel           quantize_config.json or config.json with ``dynamic`` rules
    auto-round          layer_config.json, or config.json with ``extra_config``
    compressed-tensors  config.json with ``config_groups``
    mlx-lm, torchao, modelopt, gguf  in ``runtime/module_recipes.py``

Each is resolved as its engine resolves it. Where engines would not agree about a weight, or a rule of an engine's own
would decide, that is refused: a recipe that means two things cannot be priced.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.formats import FORMATS
from runtime.module_recipes import (
    GGML_NAMES,
    UNQUANTIZED,
    Scheme,
    find_integer,
    find_torchao,
    read_gguf,
    read_mlx,
    read_modelopt,
    read_torchao,
)
from runtime.units import Weight

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# How the kind of a recipe is called -> the engine whose rules it follows.
ENGINE_OF = {
    "tensor types": "llama.cpp",
    "gptqmodel": "gptqmodel",
    "auto-round": "auto-round",
    "compressed-tensors": "transformers",
    "mlx-lm": "mlx-lm",
    "torchao": "torchao",
    "modelopt": "tensorrt-llm",
    "gguf": "llama.cpp",
}
_GGUF_MAGIC = b"GGUF"


def read_recipe(path: Path, weights: Mapping[str, Weight], config: "PretrainedConfig") -> tuple[str, dict[str, str]]:
    """Returns the kind of a recipe and its formats, weight name -> format name.

    Args:
        path: The file.
        weights: Weight name -> weight, of the model it is for.
        config: Configuration of that model, for llama.cpp's names.

    Raises:
        ValueError: If the file is none of the known kinds, leaves a weight to rules of its engine, means two things,
            or asks for a format that there is not.
    """
    if _is_gguf(path):
        return "gguf", read_gguf(path, weights, config)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"a recipe must be a text file: got '{path}' ({error}). Name a file of tensor types, JSON or GGUF."
        raise ValueError(msg) from error
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        return "tensor types", _read_tensor_types(text, weights, config)
    if not isinstance(document, dict):
        msg = f"a JSON recipe must be an object: got {type(document).__name__} in '{path}'. Name another file."
        raise ValueError(msg)
    document = document.get("quantization_config", document)
    for kind, (is_kind, read) in READERS.items():
        if is_kind(document):
            return kind, read(document, weights)
    msg = (
        f"a JSON recipe must be one of {', '.join(READERS)}: got '{path}' with the keys {sorted(document)[:8]}. "
        "Name the file that the tool wrote."
    )
    raise ValueError(msg)


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC


def _read_tensor_types(text: str, weights: Mapping[str, Weight], config: "PretrainedConfig") -> dict[str, str]:
    from runtime.exporters.llama_cpp import find_name_map, list_parts

    rules = [_tensor_rule(entry) for entry in text.split()]
    names = find_name_map(config)
    formats = {}
    for name, weight in weights.items():
        tensors = [tensor for tensor, _ in list_parts(weight, names)]
        # Searched anywhere in the name, and the first that matches counts.
        found = {next((type_ for pattern, type_ in rules if pattern.search(tensor)), None) for tensor in tensors}
        if found == {None} or len(found) > 1:
            msg = (
                f"a recipe must name one type for every weight: got {sorted(map(str, found))} for '{name}' "
                f"({', '.join(tensors)}). llama-quantize mixes what is not named by rules of its own: name it."
            )
            raise ValueError(msg)
        formats[name] = str(found.pop())
    return formats


def _tensor_rule(entry: str) -> tuple[re.Pattern[str], str]:
    pattern, separator, type_name = entry.partition("=")
    name = GGML_NAMES.get(type_name.lower(), type_name.lower())
    known = name in FORMATS and (FORMATS[name].kind == "ggml" or name in (*GGML_NAMES.values(), "mxfp4"))
    try:
        compiled = re.compile(pattern.lower())
    except re.error as error:
        known, type_name = False, f"{type_name} ({error})"
    if not separator or not known:
        types = [name for name, format_ in FORMATS.items() if format_.kind == "ggml"]
        msg = f"an entry must be PATTERN=TYPE with a type of {', '.join(types)}, mxfp4, f16, bf16: got '{entry}'."
        raise ValueError(msg)
    return compiled, name


def _modules(weights: Mapping[str, Weight]) -> Iterator[tuple[str, Weight, str]]:
    for name, weight in weights.items():
        yield name, weight, weight.parameter.removesuffix(".weight")


def _read_gptqmodel(document: Scheme, weights: Mapping[str, Weight]) -> dict[str, str]:
    # Negative rules are looked at first; patterns match from the start of a name.
    rules = sorted(document.get("dynamic", {}).items(), key=lambda rule: not rule[0].startswith("-:"))
    formats = {}
    for name, weight, module in _modules(weights):
        formats[name] = UNQUANTIZED
        if weight.kind != "linear":
            continue
        scheme: Scheme | None = document
        for rule, override in rules:
            if re.match(rule.removeprefix("+:").removeprefix("-:"), module):
                scheme = None if rule.startswith("-:") else {**document, **override}
                break
        if scheme is not None:
            formats[name] = find_integer(
                scheme["bits"], scheme["group_size"], symmetric=scheme.get("sym", True), weight=name
            )
    return formats


def _read_auto_round(document: Scheme, weights: Mapping[str, Weight]) -> dict[str, str]:
    base = document if "extra_config" in document else None
    rules: Mapping[str, Scheme] = document.get("extra_config", document)
    formats = {}
    for name, weight, module in _modules(weights):
        formats[name] = UNQUANTIZED
        if weight.kind == "embedding":
            continue
        found = rules.get(module) or next(
            (s for key, s in rules.items() if key in module or _matches(key, module)), None
        )
        if found is None and (base is None or weight.kind != "linear"):
            if weight.kind != "linear":
                continue
            msg = (
                f"a layer_config must name every layer: got none for '{module}', which AutoRound gives its own scheme. "
                "Name it, or use a config.json with extra_config."
            )
            raise ValueError(msg)
        scheme = {**(base or {}), **(found or {})}
        if scheme["bits"] < 16:
            formats[name] = find_integer(
                scheme["bits"], scheme.get("group_size", 128), symmetric=scheme.get("sym", True), weight=name
            )
    return formats


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False


def _read_compressed_tensors(document: Scheme, weights: Mapping[str, Weight]) -> dict[str, str]:
    groups = list(document["config_groups"].values())
    ignored = document.get("ignore", [])
    formats = {}
    for name, weight, module in _modules(weights):
        formats[name] = UNQUANTIZED
        if any(_targets(target, module) for target in ignored):
            continue
        exact = [g for g in groups if module in g["targets"]]
        by_pattern = [g for g in groups if any(t.startswith("re:") and _targets(t, module) for t in g["targets"])]
        by_class = [g for g in groups if weight.kind == "linear" and "Linear" in g["targets"]]
        found = {_compressed_format(g["weights"], name) for g in exact or by_pattern or by_class}
        if len(found) > 1:
            msg = (
                f"a module must be targeted by one group: got {', '.join(sorted(found))} for '{module}', where vLLM "
                "takes the first group and transformers the first pattern by name. Make the targets disjoint."
            )
            raise ValueError(msg)
        formats[name] = found.pop() if found else UNQUANTIZED
    return formats


def _targets(target: str, module: str) -> bool:
    return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module


def _compressed_format(scheme: Scheme, name: str) -> str:
    if scheme.get("type", "int") != "int":
        msg = f"a recipe's formats must be integers: got type '{scheme['type']}' for '{name}'. Price another recipe."
        raise ValueError(msg)
    group_size = -1 if scheme.get("strategy") == "channel" else scheme.get("group_size")
    return find_integer(scheme["num_bits"], group_size, symmetric=scheme.get("symmetric", True), weight=name)


def _is_mlx(document: Any) -> bool:
    return isinstance(document, dict) and {"bits", "group_size"} <= set(document) and "quant_method" not in document


# Kind -> how it is told, how it is read; the first that fits counts.
READERS: dict[str, tuple[Callable[[Scheme], bool], Callable[[Scheme, Mapping[str, Weight]], dict[str, str]]]] = {
    "compressed-tensors": (lambda document: "config_groups" in document, _read_compressed_tensors),
    "modelopt": (lambda document: "quantized_layers" in document.get("quantization", document), read_modelopt),
    "torchao": (lambda document: find_torchao(document) is not None, read_torchao),
    "mlx-lm": (lambda document: _is_mlx(document.get("quantization", document)), read_mlx),
    "gptqmodel": (lambda document: document.get("quant_method") == "gptq", _read_gptqmodel),
    "auto-round": (
        lambda document: (
            "extra_config" in document or all(isinstance(v, dict) and "bits" in v for v in document.values())
        ),
        _read_auto_round,
    ),
}
