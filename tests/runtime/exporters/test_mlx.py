"""MLX-LM directories, loaded by mlx_lm on a CPU: settings, numbers and logits."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm import load
from transformers import LlamaForCausalLM

from runtime.apply import simulated_formats
from runtime.exporters import export
from runtime.exporters.mlx import rope_settings
from runtime.formats import find_format
from runtime.loading import load_reference
from runtime.units import list_weights
from tests.tiny_models import build_tiny_llama, build_wide_llama, save_model

MENU = (
    "int2_g64_sym",
    "int3_g64_sym",
    "int4_g32_sym",
    "int5_g64_sym",
    "int6_g32_sym",
    "int8_g64_sym",
    "int4_g64",
    "fp16",
)
TOKENS = list(range(2, 34))


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_mlx_lm_loads_what_was_planned(
    tied: bool, tiny_llama_dir: Path, tiny_tied_llama_dir: Path, tmp_path: Path
) -> None:
    reference = load_reference(str(tiny_tied_llama_dir if tied else tiny_llama_dir))
    formats = {name: MENU[i % len(MENU)] for i, name in enumerate(list_weights(reference.model))}
    export(reference, formats, tmp_path / "out", exporter="mlx-lm")
    model, _ = load(str(tmp_path / "out"))
    modules = dict(model.named_modules())
    with simulated_formats(reference.model, formats), torch.no_grad():
        for name in formats:
            format_, module = find_format(formats[name]), modules[name.removesuffix(".weight")]
            assert getattr(module, "bits", None) == (None if format_.unquantized else format_.bits)
            ours = reference.model.get_parameter(name).numpy()
            if format_.unquantized:
                np.testing.assert_array_equal(np.array(module.weight.astype(mx.float32)), ours)
                continue
            assert module.group_size == format_.group_size
            scales, biases = (array.astype(mx.float32) for array in (module.scales, module.biases))
            read = np.array(mx.dequantize(module.weight, scales, biases, format_.group_size, format_.bits))
            # A bias of -scale * zero_point in float16: half a unit in the last of 11 bits.
            bound = 0.0 if format_.symmetric else 2.0**-11 * float(np.abs(np.array(biases)).max())
            assert np.abs(read - ours).max() <= bound, name
        expected = reference.model(torch.tensor([TOKENS])).logits[0].numpy()
    found = np.array(model(mx.array([TOKENS])).astype(mx.float32))[0]
    # float16 arithmetic: some 2^-11 of numbers below 4 in each of a dozen roundings one after the other.
    assert np.abs(found - expected).max() < 12 * 4 * 2.0**-11


def test_the_base_of_rotations_is_where_mlx_lm_looks(tmp_path: Path) -> None:
    # Under rope_parameters alone, as transformers 5 writes it, MLX-LM's Llama would rotate by its default of 10,000.
    model = build_tiny_llama()
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 50.0}
    reference = load_reference(str(save_model(LlamaForCausalLM(model.config).eval(), tmp_path / "model")))
    formats = dict.fromkeys(list_weights(reference.model), "int8_g32_sym")
    export(reference, formats, tmp_path / "out", exporter="mlx-lm")
    loaded, _ = load(str(tmp_path / "out"))
    loaded.set_dtype(mx.float32)
    with simulated_formats(reference.model, formats), torch.no_grad():
        expected = reference.model(torch.tensor([TOKENS])).logits[0].numpy()
    found = np.array(loaded(mx.array([TOKENS])))[0]
    # Sums of 64 and 128 products in float32, in another order.
    assert np.abs(found - expected).max() < 1e-4
    reference.model.config.rope_parameters = {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0}
    assert rope_settings(reference) == {"rope_theta": 50.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}


def test_rows_that_the_default_group_does_not_divide_are_quantized(tmp_path: Path) -> None:
    # MLX-LM's own converter leaves a layer out whose row the default group does not divide, whatever its own group is.
    model = build_wide_llama(96, 192, layers=1)
    reference = load_reference(str(save_model(model, tmp_path / "model")))
    formats = dict.fromkeys(list_weights(reference.model), "int4_g32_sym")
    formats |= {"model.embed_tokens.weight": "bf16", "model.layers.0.mlp.down_proj.weight": "int8_g64_sym"}
    export(reference, formats, tmp_path / "out", exporter="mlx-lm")
    path = tmp_path / "out" / "config.json"
    document = json.loads(path.read_text())
    # The default of the other group, as if the first quantized module had it.
    document["quantization"]["group_size"] = 64
    path.write_text(json.dumps(document))
    modules = dict(load(str(tmp_path / "out"))[0].named_modules())
    for name, format_name in formats.items():
        format_ = find_format(format_name)
        found = getattr(modules[name.removesuffix(".weight")], "group_size", None)
        assert found == (None if format_.unquantized else format_.group_size), name


def test_every_module_is_listed_by_name(tiny_llama_dir: Path, tmp_path: Path) -> None:
    # Where a path is not listed MLX takes the default settings as soon as it finds scales.
    reference = load_reference(str(tiny_llama_dir))
    names = list(list_weights(reference.model))
    export(reference, {**dict.fromkeys(names, "bf16"), names[2]: "int3_g32"}, tmp_path / "out", exporter="mlx-lm")
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert (quantization.pop("bits"), quantization.pop("group_size"), quantization.pop("mode")) == (3, 32, "affine")
    assert list(quantization) == [name.removesuffix(".weight") for name in names]
    assert [entry for entry in quantization.values() if entry] == [{"group_size": 32, "bits": 3}]
    export(reference, dict.fromkeys(names, "bf16"), tmp_path / "out", exporter="mlx-lm")
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
