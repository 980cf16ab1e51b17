"""Configurations of engines that are not at hand: names in full, keys as documented."""

import json
from pathlib import Path

import pytest
from transformers import BitsAndBytesConfig

from runtime.engines import find_engine
from runtime.exporters import export
from runtime.loading import load_reference
from runtime.units import find_units, list_weights


def test_auto_round_names_every_layer_in_full(tiny_llama_dir: Path, tmp_path: Path) -> None:
    # It escapes dots by itself: a key with an escaped dot, as in a pattern, would match nothing.
    reference = load_reference(str(tiny_llama_dir))
    names = list(list_weights(reference.model))
    formats = {**dict.fromkeys(names, "int4_g64_sym"), names[0]: "bf16", names[1]: "int8_channel_sym", names[2]: "bf16"}
    export(reference, formats, tmp_path / "out", exporter="auto-round")
    layers = json.loads((tmp_path / "out" / "layer_config.json").read_text())
    assert list(layers) == [name.removesuffix(".weight") for name in names[1:]]
    assert layers["model.layers.0.self_attn.q_proj"] == {"bits": 8, "group_size": -1, "sym": True, "data_type": "int"}
    assert layers["model.layers.0.self_attn.k_proj"] == {"bits": 16}
    assert layers["lm_head"] == {"bits": 4, "group_size": 64, "sym": True, "data_type": "int"}


def test_torchao_names_every_module_in_full(tiny_llama_dir: Path, tmp_path: Path) -> None:
    # Saving sorts the keys: the first of two patterns that match, or a default, could become another one.
    reference = load_reference(str(tiny_llama_dir))
    names = list(list_weights(reference.model))
    formats = {**dict.fromkeys(names, "int4_g64_sym"), names[0]: "bf16", names[1]: "int8_channel", names[2]: "bf16"}
    export(reference, formats, tmp_path / "out", exporter="torchao")
    modules = json.loads((tmp_path / "out" / "torchao.json").read_text())["_data"]["fqn_to_config"]
    assert list(modules) == [name.removesuffix(".weight") for name in names[1:]]
    assert [name for name, config in modules.items() if config is None] == [names[2].removesuffix(".weight")]


def test_hqq_knows_types_of_weights_alone(tiny_llama_dir: Path, tmp_path: Path) -> None:
    reference = load_reference(str(tiny_llama_dir))
    hqq = find_engine("hqq")
    units = find_units(reference.model, fuse=hqq.fusions(list_weights(reference.model)))
    # Seven types of weights over two layers, beside embedding and head.
    assert sorted(len(unit.weights) for unit in units) == [1, 1] + 7 * [2]
    menu = ("int2_g32", "int4_g64", "bf16")
    formats = {w.name: "bf16" if u.kind != "linear" else menu[i % 3] for i, u in enumerate(units) for w in u.weights}
    export(reference, formats, tmp_path / "out", exporter="hqq")
    config = json.loads((tmp_path / "out" / "hqq_config.json").read_text())
    assert config["skip_modules"] == ["lm_head"]
    assert config["dynamic_config"]["self_attn.q_proj"] == {"nbits": 4, "group_size": 64}
    assert "self_attn.k_proj" not in config["dynamic_config"]
    formats["model.layers.1.self_attn.q_proj.weight"] = "int2_g32"
    with pytest.raises(ValueError, match="one format for HQQ: got int4_g64 and int2_g32 for 'self_attn.q_proj'"):
        export(reference, formats, tmp_path / "out", exporter="hqq")


def test_bitsandbytes_skips_what_stays_unquantized(tiny_llama_dir: Path, tmp_path: Path) -> None:
    reference = load_reference(str(tiny_llama_dir))
    weights = list_weights(reference.model)
    kept = "model.layers.1.mlp.up_proj"
    formats = {n: "int8_channel_sym" if w.kind == "linear" else "bf16" for n, w in weights.items()}
    export(reference, {**formats, f"{kept}.weight": "bf16"}, tmp_path / "out", exporter="bitsandbytes")
    config = BitsAndBytesConfig(**json.loads((tmp_path / "out" / "bitsandbytes_config.json").read_text()))
    assert config.quantization_method() == "llm_int8"
    assert config.llm_int8_skip_modules == ["model.embed_tokens", kept, "lm_head"]
    # No column is multiplied unquantized because its numbers are large.
    assert config.llm_int8_threshold == 0.0


def test_modelopt_names_every_layer_once(tiny_llama_dir: Path, tmp_path: Path) -> None:
    reference = load_reference(str(tiny_llama_dir))
    names = list(list_weights(reference.model))
    formats = {**dict.fromkeys(names, "bf16"), names[1]: "nvfp4", names[2]: "mxfp8_e4m3"}
    export(reference, formats, tmp_path / "out", exporter="modelopt")
    quantization = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert quantization["quant_algo"] == "MIXED_PRECISION"
    assert quantization["quantized_layers"] == {
        "model.layers.0.self_attn.q_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "model.layers.0.self_attn.k_proj": {"quant_algo": "MXFP8", "group_size": 32},
    }
    listed = [*quantization["quantized_layers"], *quantization["exclude_modules"]]
    assert sorted(listed) == sorted(name.removesuffix(".weight") for name in names)
