"""AutoRound reads the plan, quantizes by it, and its own configuration is read back as the plan.

Runs where AutoRound is installed (make engines). It is not among the tests' packages, because it asks for a build of
torch of its own.
"""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from runtime.exporters import export
from runtime.formats import find_format
from runtime.loading import load_reference
from runtime.recipes import read_recipe
from runtime.units import list_weights

pytest.importorskip("auto_round", reason="make engines runs this with AutoRound")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
MENU = ("int4_g64_sym", "int8_g32_sym", "int2_g32_sym", "bf16", "int3_g64_sym")


def test_auto_round_quantizes_by_the_plan(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from auto_round import AutoRound

    reference = load_reference(str(tiny_llama_dir))
    weights = list_weights(reference.model)
    formats = {n: MENU[i % len(MENU)] if w.kind == "linear" else "bf16" for i, (n, w) in enumerate(weights.items())}
    export(reference, formats, tmp_path / "out", exporter="auto-round")
    layers = json.loads((tmp_path / "out" / "layer_config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    settings = {"bits": 4, "group_size": 64, "sym": True, "iters": 0, "disable_opt_rtn": True}
    rounding = AutoRound(model, reference.tokenizer, layer_config=layers, device_map="cpu", **settings)
    rounding.quantize_and_save(str(tmp_path / "quantized"), format="auto_round")
    [config] = (tmp_path / "quantized").rglob("config.json")
    kind, found = read_recipe(config, weights, reference.model.config)
    assert (kind, found) == ("auto-round", formats)
    loaded = AutoModelForCausalLM.from_pretrained(config.parent)
    for name in formats:
        module, format_ = loaded.get_submodule(name.removesuffix(".weight")), find_format(formats[name])
        assert getattr(module, "bits", None) == (None if format_.unquantized else format_.bits)
        assert getattr(module, "group_size", None) == (None if format_.unquantized else format_.group_size)
