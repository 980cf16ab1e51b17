"""Recipes: what our exporters write is read back as planned, and what engines resolve otherwise is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.engines import ENGINES
from runtime.exporters import export
from runtime.formats import find_format
from runtime.loading import ReferenceModel, load_reference
from runtime.recipes import ENGINE_OF, read_recipe
from runtime.units import Weight, find_units, list_weights

FILES = {
    "tensor types": "tensor-types.txt",
    "gptqmodel": "quantize_config.json",
    "auto-round": "layer_config.json",
    "compressed-tensors": "config.json",
    "mlx-lm": "config.json",
    "torchao": "torchao.json",
    "modelopt": "hf_quant_config.json",
    "gguf": "model.gguf",
}


@pytest.fixture(scope="module")
def reference(tiny_llama_dir: Path) -> ReferenceModel:
    return load_reference(str(tiny_llama_dir))


@pytest.fixture(scope="module")
def weights(reference: ReferenceModel) -> Mapping[str, Weight]:
    return list_weights(reference.model)


def legal_formats(reference: ReferenceModel, engine_name: str, seed: int) -> dict[str, str]:
    """Returns a random legal plan of an engine, unquantized weights as bf16."""
    engine, rng = ENGINES[engine_name], np.random.default_rng(seed)
    formats = {}
    for unit in find_units(reference.model, fuse=engine.fusions(list_weights(reference.model))):
        legal = [
            name
            for name in engine.menu
            if engine.refusal(unit, find_format(name)) is None
            and all(find_format(name).fits(weight.shape[1]) for weight in unit.weights)
        ]
        formats |= {weight.name: str(rng.choice(legal)) for weight in unit.weights[:1]}
        formats |= {weight.name: formats[unit.weights[0].name] for weight in unit.weights}
    return formats


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", FILES)
def test_an_export_is_read_back_as_planned(
    kind: str, seed: int, reference: ReferenceModel, weights: Mapping[str, Weight], tmp_path: Path
) -> None:
    engine = ENGINES[ENGINE_OF[kind]]
    formats = legal_formats(reference, engine.name, seed)
    export(reference, formats, tmp_path / "out", exporter=engine.exporter)
    assert read_recipe(tmp_path / "out" / FILES[kind], weights, reference.model.config) == (kind, formats)


def read(text: str, reference: ReferenceModel, directory: Path) -> dict[str, str]:
    path = directory / "recipe"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path, list_weights(reference.model), reference.model.config)[1]


def test_tensor_types_search_anywhere_and_the_first_counts(reference: ReferenceModel, tmp_path: Path) -> None:
    formats = read("blk\\.0=Q8_0 attn_(q|k)=q5_0\nATTN=Q4_1 weight=f16", reference, tmp_path)
    assert formats["model.layers.0.self_attn.q_proj.weight"] == "q8_0"
    assert formats["model.layers.1.self_attn.q_proj.weight"] == "q5_0"
    assert formats["model.layers.1.self_attn.o_proj.weight"] == "q4_1"
    assert formats["model.layers.1.mlp.up_proj.weight"] == formats["lm_head.weight"] == "fp16"


def compressed(*groups: tuple[list[str], int]) -> str:
    config_groups = {
        f"group_{i}": {
            "targets": targets,
            "weights": {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64},
        }
        for i, (targets, bits) in enumerate(groups)
    }
    return json.dumps({"quantization_config": {"config_groups": config_groups, "ignore": ["lm_head"]}})


def test_compressed_tensors_prefers_names_to_patterns_to_classes(reference: ReferenceModel, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    formats = read(compressed((["Linear"], 4), (["re:.*self_attn.*"], 8), ([name], 3)), reference, tmp_path)
    assert formats[f"{name}.weight"] == "int3_g64_sym"
    assert formats["model.layers.0.self_attn.k_proj.weight"] == "int8_g64_sym"
    assert formats["model.layers.0.mlp.up_proj.weight"] == "int4_g64_sym"
    assert formats["lm_head.weight"] == formats["model.embed_tokens.weight"] == "bf16"


def test_gptqmodel_looks_at_negative_rules_first(reference: ReferenceModel, tmp_path: Path) -> None:
    dynamic = {"+:.*layers\\.0.*": {"bits": 8}, "-:.*layers\\.0\\.mlp\\.down_proj": {}, ".*": {"group_size": 32}}
    document = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "dynamic": dynamic}
    formats = read(json.dumps(document), reference, tmp_path)
    assert formats["model.layers.0.mlp.down_proj.weight"] == "bf16"
    assert formats["model.layers.0.mlp.up_proj.weight"] == "int8_g64_sym"
    assert formats["model.layers.1.mlp.up_proj.weight"] == "int4_g32_sym"
    assert formats["lm_head.weight"] == "bf16"


def test_auto_round_configurations_have_a_base(reference: ReferenceModel, tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.q_proj": {"bits": 16}, ".*k_proj.*": {"bits": 8, "group_size": 32}, "(": {}}
    document = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": True, "extra_config": extra}
    formats = read(json.dumps(document), reference, tmp_path)
    assert formats["model.layers.0.self_attn.q_proj.weight"] == "bf16"
    assert formats["model.layers.1.self_attn.k_proj.weight"] == "int8_g32_sym"
    assert formats["model.layers.1.mlp.up_proj.weight"] == "int4_g64_sym"
    assert formats["lm_head.weight"] == formats["model.embed_tokens.weight"] == "bf16"


def test_mlx_gives_the_default_to_what_is_not_named(reference: ReferenceModel, tmp_path: Path) -> None:
    settings = {"group_size": 128, "bits": 4, "mode": "affine", "model.layers.0.mlp.down_proj": {"bits": 8}}
    settings["model.layers.1.mlp.down_proj"] = False
    settings["lm_head"] = {"group_size": 32, "bits": 6}
    formats = read(json.dumps({"model_type": "llama", "quantization": settings}), reference, tmp_path)
    assert formats["model.layers.0.mlp.down_proj.weight"] == "int8_g128"
    assert formats["model.layers.1.mlp.down_proj.weight"] == "bf16"
    assert formats["lm_head.weight"] == "int6_g32"
    # Rows of 64 are no multiple of the default group.
    assert formats["model.layers.0.mlp.up_proj.weight"] == formats["model.embed_tokens.weight"] == "bf16"


def torchao(**modules: dict[str, Any] | None) -> str:
    return json.dumps({"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": modules}})


def rounded(bits: int, group_size: int) -> dict[str, Any]:
    data = {
        "weight_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"},
        "granularity": {"_type": "PerGroup", "_data": {"group_size": group_size}},
    }
    return {"_type": "IntxWeightOnlyConfig", "_data": data}


def test_torchao_prefers_names_to_patterns_to_the_default(reference: ReferenceModel, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    modules = {"_default": rounded(4, 64), "re:.*down_proj": rounded(3, 32), name: rounded(8, 64), "lm_head": None}
    formats = read(torchao(**modules), reference, tmp_path)
    assert formats[f"{name}.weight"] == "int8_g64_sym"
    assert formats["model.layers.1.mlp.down_proj.weight"] == "int3_g32_sym"
    assert formats["model.layers.1.mlp.up_proj.weight"] == "int4_g64_sym"
    assert formats["lm_head.weight"] == formats["model.embed_tokens.weight"] == "bf16"
    saved = {
        "quantization_config": {"quant_method": "torchao", "quant_type": {"default": json.loads(torchao(**modules))}}
    }
    assert read(json.dumps(saved), reference, tmp_path) == formats


def test_modelopt_is_read_in_both_of_its_shapes(reference: ReferenceModel, tmp_path: Path) -> None:
    layers = {"model.layers.0.mlp.down_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16}}
    nested = json.dumps({"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}})
    flat = json.dumps({"quantization_config": {"quant_method": "modelopt", "quantized_layers": layers}})
    formats = read(nested, reference, tmp_path)
    assert [name for name, found in formats.items() if found == "nvfp4"] == ["model.layers.0.mlp.down_proj.weight"]
    assert read(flat, reference, tmp_path) == formats


def test_a_file_of_another_model_is_refused(
    reference: ReferenceModel, tiny_tied_llama_dir: Path, tmp_path: Path
) -> None:
    tied = load_reference(str(tiny_tied_llama_dir))
    export(tied, dict.fromkeys(list_weights(tied.model), "q4_0"), tmp_path / "out", exporter="llama.cpp")
    with pytest.raises(ValueError, match=r"among the formats: got none for 'lm_head\.weight' in '.*model.gguf'"):
        read_recipe(tmp_path / "out" / "model.gguf", list_weights(reference.model), reference.model.config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blk=q8_0", r"one type for every weight: got \['None'\] for 'model\.embed_tokens\.weight'.*name it"),
        ("weight=q4_k_m", r"PATTERN=TYPE with a type of q4_0, .*: got 'weight=q4_k_m'"),
        ("weight=int4_g64", "got 'weight=int4_g64'"),
        ("weight", "got 'weight'"),
        ("(weight=q4_0", r"got '\(weight=q4_0'"),
        ("[]", "a JSON recipe must be an object: got list"),
        ('{"bits": 4}', r"must be one of compressed-tensors, .*gptqmodel, auto-round: got .* with the keys \['bits'\]"),
        (
            compressed((["re:.*self_attn.*"], 4), (["re:.*layers\\.1\\.self_attn.*"], 8)),
            r"one group: got int4_g64_sym, int8_g64_sym for 'model\.layers\.1\.self_attn\.q_proj', where vLLM",
        ),
        (
            '{"model.layers.0.mlp.up_proj": {"bits": 4}}',
            "must name every layer: got none for 'model.layers.0.self_attn",
        ),
        (
            '{"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}',
            "must be affine: got mode='mxfp4' for 'model.embed_tokens.weight'",
        ),
        (
            torchao(**{"re:.*proj": rounded(4, 64), "re:.*down_proj": rounded(8, 64)}),
            "patterns of one format: got int4_g64_sym, int8_g64_sym for 'model.layers.0.mlp.down_proj'",
        ),
        (
            torchao(lm_head={"_type": "Float8WeightOnlyConfig", "_data": {}}),
            "must round weights to integers: got Float8WeightOnlyConfig for 'lm_head.weight'",
        ),
        (
            '{"quantization": {"quantized_layers": {"lm_head": {"quant_algo": "FP8"}}}}',
            "must store weights as W4A16_NVFP4, MXFP8: got 'FP8' for 'lm_head.weight'",
        ),
        (
            '{"quant_method": "gptq", "bits": 4, "group_size": 48}',
            "among ours: got bits=4, group_size=48 for 'model.layers.0.self_attn.q_proj.weight'",
        ),
        (
            compressed((["Linear"], 8)).replace('"type": "int"', '"type": "float"'),
            "formats must be integers: got type 'float' for 'model.layers.0.self_attn.q_proj.weight'",
        ),
    ],
)
def test_refusals(text: str, message: str, reference: ReferenceModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(text, reference, tmp_path)


def test_a_missing_file_is_refused(reference: ReferenceModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a recipe must be a text file: got '.*nowhere'"):
        read_recipe(tmp_path / "nowhere", {}, reference.model.config)
