"""torchao reads the plan and quantizes by it, module by module.

Runs where torchao is installed (make engines). It is not among the tests' packages: where it is, transformers imports
it with every model, it writes warnings to stderr, and its memory hides that of what is measured.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

from runtime.exporters import export
from runtime.formats import find_format
from runtime.loading import load_reference
from runtime.units import list_weights

pytest.importorskip("torchao", reason="make engines runs this with torchao")

MENU = ("int2_g64_sym", "int3_channel", "int4_g32_sym", "int5_g64", "int6_g64_sym", "int8_channel_sym", "bf16")


def test_torchao_quantizes_by_the_plan(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from torchao.core.config import config_from_dict
    from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    reference = load_reference(str(tiny_llama_dir))
    formats = {
        name: MENU[i % len(MENU)] if weight.kind == "linear" else "bf16"
        for i, (name, weight) in enumerate(list_weights(reference.model).items())
    }
    export(reference, formats, tmp_path / "out", exporter="torchao")
    config = config_from_dict(json.loads((tmp_path / "out" / "torchao.json").read_text()))
    assert isinstance(config, FqnToConfig)
    modules = {name.removesuffix(".weight"): find_format(formats[name]) for name in formats if "embed" not in name}
    assert set(config.fqn_to_config) == set(modules)
    for name, format_ in modules.items():
        found = config.fqn_to_config[name]
        assert (found is None) == format_.unquantized
        if found is None:
            continue
        assert isinstance(found, IntxWeightOnlyConfig)
        assert found.weight_dtype == getattr(torch, f"int{format_.bits}")
        assert found.granularity == (PerAxis(0) if format_.group_size is None else PerGroup(format_.group_size))
        assert found.mapping_type == (MappingType.SYMMETRIC if format_.symmetric else MappingType.ASYMMETRIC)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama_dir, dtype=torch.float32, quantization_config=TorchAoConfig(config)
    )
    for name, format_ in modules.items():
        quantized = type(model.get_submodule(name).weight).__name__ != "Parameter"
        assert quantized != format_.unquantized, name
