"""Rules of GPTQModel, matched as GPTQModel matches them (from the start, the first counts) and as vLLM does."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from runtime.exporters import export
from runtime.exporters.gptqmodel import gptq_scheme
from runtime.formats import find_format
from runtime.loading import load_reference
from runtime.units import list_weights

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def resolve(config: dict[str, Any], module: str) -> dict[str, Any] | None:
    """Returns the settings of a module: those of the first rule that matches, else the base's; None if skipped."""
    base = {name: config[name] for name in ("bits", "group_size", "sym")}
    for rule, override in config["dynamic"].items():
        sign, pattern = rule[:2], rule[2:]
        if re.match(pattern, module):
            return None if sign == "-:" else {**base, **override}
    return base


@pytest.fixture
def formats(tiny_llama_dir: Path) -> dict[str, str]:
    """Fused projections agree in layer 0 and differ in layer 1."""
    formats = dict.fromkeys(list_weights(load_reference(str(tiny_llama_dir)).model), "int4_g64")
    for role, name in {"self_attn.q": "int8_g32", "self_attn.k": "int8_g32", "self_attn.v": "int8_g32"}.items():
        formats[f"model.layers.0.{role}_proj.weight"] = name
    formats["model.layers.1.self_attn.q_proj.weight"] = "int3_channel_sym"
    formats["model.layers.1.mlp.down_proj.weight"] = "bf16"
    formats["model.embed_tokens.weight"] = formats["lm_head.weight"] = "bf16"
    return formats


def write(directory: Path, formats: dict[str, str], out: Path) -> dict[str, Any]:
    export(load_reference(str(directory)), formats, out, exporter="gptqmodel")
    document: dict[str, Any] = json.loads((out / "quantize_config.json").read_text())
    return document


def test_each_module_gets_its_format(tiny_llama_dir: Path, formats: dict[str, str], tmp_path: Path) -> None:
    config = write(tiny_llama_dir, formats, tmp_path / "out")
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 64, False)
    for name, format_name in formats.items():
        if "layers" not in name:
            continue
        format_, module = find_format(format_name), name.removesuffix(".weight")
        assert resolve(config, module) == (None if format_.unquantized else gptq_scheme(format_)), module
        assert sum(bool(re.match(rule[2:], module)) for rule in config["dynamic"]) <= 1


def test_fused_modules_get_what_their_parts_get(tiny_llama_dir: Path, formats: dict[str, str], tmp_path: Path) -> None:
    # vLLM asks for qkv_proj; a rule for (q|k|v)_proj alone would silently leave it at the base.
    config = write(tiny_llama_dir, formats, tmp_path / "out")
    for layer in (0, 1):
        for block, fused in (("self_attn", "qkv_proj"), ("mlp", "gate_up_proj")):
            stem = f"model.layers.{layer}.{block}."
            parts = [resolve(config, stem + part) for part in FUSED[fused]]
            if all(part == parts[0] for part in parts):
                assert resolve(config, stem + fused) == parts[0]


def test_a_plan_without_quantized_layers_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    reference = load_reference(str(tiny_llama_dir))
    formats = dict.fromkeys(list_weights(reference.model), "bf16")
    with pytest.raises(ValueError, match="must quantize a weight of a layer: got none"):
        export(reference, formats, tmp_path / "out", exporter="gptqmodel")
