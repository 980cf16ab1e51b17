"""vLLM's own classes resolve what we write: each of its modules, fused ones and experts too, gets the plan's format.

Runs where vLLM is installed, which asks for versions of its own: make engines. Nothing is loaded here; a whole model
runs in tests/end_to_end/test_smollm2_vllm.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.engines import find_engine
from runtime.exporters import export
from runtime.formats import find_format
from runtime.loading import ReferenceModel, load_reference
from runtime.units import Unit, find_units, list_weights
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral, build_tiny_qwen_moe, save_model

pytest.importorskip("vllm", reason="make engines runs this with vLLM in an environment of its own")

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# Roles of units -> what vLLM calls the module.
MODULES = {"q_proj+k_proj+v_proj": "qkv_proj", "gate_proj+up_proj": "gate_up_proj"}


def mix(reference: ReferenceModel, engine_name: str, menu: tuple[str, ...]) -> dict[str, tuple[Unit, str]]:
    """Returns vLLM's name of each linear module -> its unit and format, formats in turn."""
    engine = find_engine(engine_name)
    units = find_units(reference.model, fuse=engine.fusions(list_weights(reference.model)))
    linear = [unit for unit in units if unit.kind == "linear"]
    named = {}
    for i, unit in enumerate(linear):
        stem, _, part = unit.weights[0].parameter.removesuffix(".weight").rpartition(".")
        named[f"{stem}.{MODULES.get(unit.role, part)}"] = (unit, menu[i % len(menu)])
    return named


def formats_of(reference: ReferenceModel, named: dict[str, tuple[Unit, str]]) -> dict[str, str]:
    """Returns weight name -> format name; what is no linear module stays unquantized."""
    formats = dict.fromkeys(list_weights(reference.model), "bf16")
    return formats | {weight.name: name for unit, name in named.values() for weight in unit.weights}


@pytest.fixture
def reference(tmp_path: Path) -> ReferenceModel:
    return load_reference(str(save_model(build_tiny_llama(), tmp_path / "model")))


def written(reference: ReferenceModel, formats: dict[str, str], out: Path, engine: str, file: str) -> dict[str, Any]:
    export(reference, formats, out, exporter=find_engine(engine).exporter)
    document: dict[str, Any] = json.loads((out / file).read_text())
    return document


def compressed_config(document: dict[str, Any]) -> Any:
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    config: Any = CompressedTensorsConfig.from_config(document["quantization_config"])
    config.packed_modules_mapping = FUSED
    return config


def test_compressed_tensors(reference: ReferenceModel, tmp_path: Path) -> None:
    named = mix(reference, "vllm", ("int4_g64_sym", "int4_g32", "bf16", "int4_channel_sym", "int8_g64_sym"))
    config = compressed_config(
        written(reference, formats_of(reference, named), tmp_path / "out", "vllm", "config.json")
    )
    for module, (_, name) in named.items():
        format_, found = find_format(name), config.get_scheme_dict(torch.nn.Linear(1, 1), module)
        if format_.unquantized:
            assert found is None, module
            continue
        weights = found["weights"]
        assert (weights.num_bits, weights.group_size, weights.symmetric, found["format"]) == (
            format_.bits,
            format_.group_size,
            format_.symmetric,
            "pack-quantized",
        ), module


@pytest.mark.parametrize(
    ("build", "experts", "roles"),
    [
        (build_tiny_mixtral, "block_sparse_moe.experts", ("w1", "w3", "w2")),
        (build_tiny_qwen_moe, "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    ],
    ids=["mixtral", "qwen2 mixture"],
)
def test_experts_of_a_layer_are_found_by_the_first(
    build: Any, experts: str, roles: tuple[str, ...], tmp_path: Path
) -> None:
    # It looks at expert 0 alone, wants its three projections alike, and takes that for the layer's other experts.
    reference = load_reference(str(save_model(build(), tmp_path / "model")))
    by_layer = {"layers.0": "int4_g32_sym", "layers.1": "bf16"}
    formats = {
        name: next(f for layer, f in by_layer.items() if layer in name) if weight.kind == "expert" else "bf16"
        for name, weight in list_weights(reference.model).items()
    }
    config = compressed_config(written(reference, formats, tmp_path / "out", "vllm", "config.json"))
    config._add_fused_moe_to_target_scheme_map()
    for layer, name in by_layer.items():
        schemes = [config.get_scheme_dict(torch.nn.Linear(1, 1), f"model.{layer}.{experts}.0.{role}") for role in roles]
        assert all(scheme == schemes[0] for scheme in schemes)
        assert (schemes[0] and schemes[0]["weights"].num_bits) == (None if name == "bf16" else 4)


def test_gptqmodel_rules_by_fused_names(reference: ReferenceModel, tmp_path: Path) -> None:
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
    from vllm.model_executor.layers.quantization.utils.gptq_utils import get_dynamic_override

    named = mix(reference, "gptqmodel", ("int4_g64_sym", "int8_g32_sym", "bf16", "int8_channel_sym"))
    document = written(reference, formats_of(reference, named), tmp_path / "out", "gptqmodel", "quantize_config.json")
    config: Any = AutoGPTQConfig.from_config(document)
    for module, (_, name) in named.items():
        format_ = find_format(name)
        skipped = get_dynamic_override(config, layer_name=module) is False
        assert skipped == format_.unquantized, module
        if not skipped:
            for key, value in (("bits", format_.bits), ("group_size", format_.group_size or -1)):
                assert get_dynamic_override(config, module, key, document[key]) == value, module


def test_auto_round_layers_by_fused_names(reference: ReferenceModel, tmp_path: Path) -> None:
    from vllm.model_executor.layers.quantization.inc.inc import INCConfig

    named = mix(reference, "auto-round", ("int4_g64_sym", "int8_g32_sym", "bf16", "int8_channel_sym"))
    layers = written(reference, formats_of(reference, named), tmp_path / "out", "auto-round", "layer_config.json")
    # As AutoRound writes it into the configuration of what it has quantized.
    base = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": True, "data_type": "int"}
    config: Any = INCConfig.from_config({**base, "packing_format": "auto_round:auto_gptq", "extra_config": layers})
    config.packed_modules_mapping = FUSED
    for module, (_, name) in named.items():
        format_ = find_format(name)
        bits, group_size, symmetric = config.get_layer_config(torch.nn.Linear(1, 1), module)
        assert bits == (16 if format_.unquantized else format_.bits), module
        if not format_.unquantized:
            assert (group_size, symmetric) == (format_.group_size or -1, format_.symmetric), module


def test_modelopt_layers_by_fused_names(reference: ReferenceModel, tmp_path: Path) -> None:
    # What TensorRT-LLM reads too. Nothing of it was run on a GPU.
    from vllm.model_executor.layers.quantization.modelopt import ModelOptMixedPrecisionConfig

    algorithms = {"nvfp4": "W4A16_NVFP4", "mxfp8_e4m3": "MXFP8", "bf16": None}
    named = mix(reference, "tensorrt-llm", tuple(algorithms))
    document = written(
        reference, formats_of(reference, named), tmp_path / "out", "tensorrt-llm", "hf_quant_config.json"
    )
    config: Any = ModelOptMixedPrecisionConfig.from_config(document)
    config.packed_modules_mapping = FUSED
    for module, (_, name) in named.items():
        assert config._resolve_quant_algo(module) == algorithms[name], module
    assert config._resolve_quant_algo("lm_head") is None
