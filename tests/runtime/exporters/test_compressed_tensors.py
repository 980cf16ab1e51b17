"""compressed-tensors, judged by the library itself and by transformers that loads the result."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from runtime.apply import simulated_formats
from runtime.checkpoint import exact_dtype
from runtime.exporters import MANIFEST, export
from runtime.exporters.compressed_tensors import compress, weight_scheme
from runtime.formats import FORMATS, find_format
from runtime.loading import load_reference
from runtime.packing import unpack_codes
from runtime.rendering import encode, render
from runtime.simulated_activations import simulated_activations
from runtime.units import list_weights, read_weight
from tests.tiny_models import build_tiny_mixtral, build_tiny_qwen_moe, save_model

INTEGERS = [name for name, format_ in FORMATS.items() if format_.kind == "int" and format_.scale_type == "fp16"]
SYMMETRIC = ("int2_g64_sym", "int3_channel_sym", "int4_g32_sym", "int5_g64_sym", "int6_g64_sym", "int7_g16_sym", "fp16")
VLLM = "compressed-tensors for vLLM"
TOKENS = torch.arange(2, 34)[None]


def mix(model: torch.nn.Module, formats: tuple[str, ...] = SYMMETRIC) -> dict[str, str]:
    """Returns formats for all weights in turn; embeddings stay unquantized."""
    weights = list_weights(model).items()
    return {
        name: "bf16" if weight.kind == "embedding" else formats[i % len(formats)]
        for i, (name, weight) in enumerate(weights)
    }


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_transformers_loads_what_was_planned(
    tied: bool, tiny_llama_dir: Path, tiny_tied_llama_dir: Path, tmp_path: Path
) -> None:
    reference = load_reference(str(tiny_tied_llama_dir if tied else tiny_llama_dir))
    formats = mix(reference.model)
    export(reference, formats, tmp_path / "out", exporter="compressed-tensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for name, weight in list_weights(reference.model).items():
        format_ = find_format(formats[name])
        scheme = getattr(loaded.get_submodule(weight.parameter.removesuffix(".weight")), "quantization_scheme", None)
        assert (scheme is None) == format_.unquantized, name
        if scheme is not None:
            assert scheme.weights.num_bits == format_.bits
            assert scheme.weights.group_size == format_.group_size
            assert scheme.weights.symmetric == format_.symmetric
    with torch.no_grad(), simulated_formats(reference.model, formats):
        # transformers decompresses on the first forward pass, into the same float32 numbers: no tolerance.
        assert torch.equal(loaded(TOKENS).logits, reference.model(TOKENS).logits)
        for name, weight in list_weights(reference.model).items():
            assert torch.equal(loaded.get_parameter(weight.parameter), reference.model.get_parameter(name)), name


@settings(deadline=None)
@given(
    name=st.sampled_from(INTEGERS),
    rows=st.sampled_from([1, 3, 7, 32, 33]),
    groups=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_the_library_reads_back_our_weights(name: str, rows: int, groups: int, seed: int) -> None:
    format_ = find_format(name)
    in_features = groups * (format_.group_size or 23)
    weight = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed))
    tensors = compress(encode(weight, format_), format_, (rows, in_features))
    assert tensors["weight_packed"].shape == (rows, -(-in_features * format_.bits // 32))
    scheme = QuantizationScheme(targets=["Linear"], weights=weight_scheme(format_))
    # The scale in float32, so that the library's product is taken in float32 as ours is.
    tensors["weight_scale"] = tensors["weight_scale"].float()
    read = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    assert torch.equal(read, render(weight, format_))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_power_of_two_widths_read_alike_in_every_version(bits: int) -> None:
    # Until 0.17 a word held 32 // bits codes, the first in its lowest bits.
    format_ = find_format(f"int{bits}_g32_sym")
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    stored = encode(weight, format_)
    codes = unpack_codes(stored["codes"], bits, 96).to(torch.int64).view(5, -1, 32 // bits)
    words = sum(codes[..., i] << (bits * i) for i in range(32 // bits))
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    assert torch.equal(compress(stored, format_, (5, 96))["weight_packed"], signed)


def test_targets_are_names_and_name_each_module_once(tiny_llama_dir: Path, tmp_path: Path) -> None:
    # Overlapping patterns are resolved in another order by vLLM than by transformers.
    reference = load_reference(str(tiny_llama_dir))
    formats = mix(reference.model)
    export(reference, formats, tmp_path / "out", exporter="compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    modules = {weight.parameter.removesuffix(".weight") for weight in list_weights(reference.model).values()}
    assert sorted([*targets, *config["ignore"]]) == sorted(modules)
    assert list(config["config_groups"]) == [f"group_{i}" for i in range(6)]
    assert config["version"] == "0.18.0"
    # vLLM refuses an order of columns by activations.
    assert "actorder" not in json.dumps(config)


def test_a_tied_head_is_ignored_with_its_embedding(tiny_tied_llama_dir: Path, tmp_path: Path) -> None:
    reference = load_reference(str(tiny_tied_llama_dir))
    export(reference, mix(reference.model), tmp_path / "out", exporter="compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert {"model.embed_tokens", "lm_head"} <= set(config["ignore"])


def test_bytes_are_those_of_codes_scales_and_the_rest(tiny_llama_dir: Path, tmp_path: Path) -> None:
    reference = load_reference(str(tiny_llama_dir))
    formats = mix(reference.model, ("int4_g32_sym", "int8_g64_sym"))
    export(reference, formats, tmp_path / "out", exporter="compressed-tensors")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    weights = list_weights(reference.model)
    # Rows of 4 and 8 bits fill whole words; a weight's shape takes two numbers of eight bytes more.
    expected = sum(find_format(formats[n]).storage_bytes(w.shape) for n, w in weights.items())
    expected += 16 * sum(not find_format(name).unquantized for name in formats.values())
    rest = [t for n, t in reference.model.state_dict().items() if n not in weights]
    expected += sum(t.numel() * exact_dtype(t).itemsize for t in rest)
    assert sum(t.numel() * t.itemsize for t in tensors.values()) == expected


@pytest.mark.parametrize("build", [build_tiny_mixtral, build_tiny_qwen_moe], ids=["mixtral", "qwen2 mixture"])
@pytest.mark.parametrize(("exporter", "experts"), [("compressed-tensors", "fp16"), (VLLM, "int4_g32_sym")])
def test_mixtures_load(build: Callable[[], PreTrainedModel], exporter: str, experts: str, tmp_path: Path) -> None:
    reference = load_reference(str(save_model(build(), tmp_path / "model")))
    formats = {
        name: {"expert": experts, "embedding": "fp16"}.get(weight.kind, "int4_g32_sym")
        for name, weight in list_weights(reference.model).items()
    }
    export(reference, formats, tmp_path / "out", exporter=exporter)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad(), simulated_formats(reference.model, formats):
        model(TOKENS)
        for weight in list_weights(reference.model).values():
            ours, theirs = read_weight(reference.model, weight), read_weight(model, weight)
            # transformers takes the product of experts' codes and scales in float16, half a unit in the last place.
            bound = 2.0**-11 * float(ours.abs().max()) if weight.kind == "expert" else 0.0
            assert float((ours - theirs).abs().max()) <= bound, weight.name


def test_vllm_finds_every_expert_by_name(tmp_path: Path) -> None:
    # It looks at each projection of each expert, quantized or not.
    for build, gate, down in ((build_tiny_mixtral, "w1", "w2"), (build_tiny_qwen_moe, "gate_proj", "down_proj")):
        reference = load_reference(str(save_model(build(), tmp_path / gate)))
        block = "block_sparse_moe" if gate == "w1" else "mlp"
        weights = list_weights(reference.model)
        for name in ("int4_g32_sym", "fp16"):
            formats = {n: name if "layers.0" in n and w.kind == "expert" else "fp16" for n, w in weights.items()}
            export(reference, formats, tmp_path / "out", exporter=VLLM)
            tensors = load_file(tmp_path / "out" / "model.safetensors")
            ending = "weight" if name == "fp16" else "weight_packed"
            for expert, role in itertools.product(range(4), (gate, down)):
                assert f"model.layers.0.{block}.experts.{expert}.{role}.{ending}" in tensors
                assert f"model.layers.1.{block}.experts.{expert}.{role}.weight" in tensors
            assert f"model.layers.0.{block}.gate.weight" in tensors
            assert not any("gate_up_proj" in tensor for tensor in tensors)


def test_an_unquantized_plan_is_a_plain_model(tiny_llama_dir: Path, tmp_path: Path) -> None:
    reference = load_reference(str(tiny_llama_dir))
    formats = dict.fromkeys(list_weights(reference.model), "bf16")
    export(reference, formats, tmp_path / "out", exporter="compressed-tensors")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad(), simulated_formats(reference.model, formats):
        assert torch.equal(loaded(TOKENS).logits, reference.model(TOKENS).logits)


def test_refusals(tiny_llama_dir: Path, tmp_path: Path) -> None:
    reference = load_reference(str(tiny_llama_dir))
    formats = mix(reference.model)
    with pytest.raises(ValueError, match="exporter must be one of compressed-tensors.*: got 'caffe'"):
        export(reference, formats, tmp_path / "out", exporter="caffe")
    left = dict(list(formats.items())[1:])
    with pytest.raises(ValueError, match=r"got none for 1 weights, first 'model\.embed_tokens\.weight'"):
        export(reference, left, tmp_path / "out", exporter="compressed-tensors")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="hold an export already: got .*thesis.tex"):
        export(reference, formats, tmp_path / "mine", exporter="compressed-tensors")
    export(reference, formats, tmp_path / "out", exporter="compressed-tensors")
    export(reference, dict.fromkeys(formats, "bf16"), tmp_path / "out", exporter="compressed-tensors")
    assert set(json.loads((tmp_path / "out" / MANIFEST).read_text())["formats"].values()) == {"bf16"}


@pytest.mark.parametrize("activation", ["int8_token", "int4_token", "fp8_token", "int8_tensor_static"])
@pytest.mark.parametrize("weights", ["int8_channel_sym", "int4_g32_sym"])
def test_transformers_rounds_the_inputs_as_planned(
    weights: str, activation: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    reference = load_reference(str(tiny_llama_dir))
    linear = [w for w in list_weights(reference.model).values() if w.kind == "linear"]
    formats = dict.fromkeys(list_weights(reference.model), "bf16") | {w.name: weights for w in linear}
    scale = [0.03125] if activation.endswith("static") else None
    # One layer reads its input as it is, with the same format of weights.
    scheme = {w.parameter.removesuffix(".weight"): (activation, scale) for w in linear[1:]}
    export(reference, formats, tmp_path / "out", exporter="compressed-tensors", activations=scheme)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad(), simulated_formats(reference.model, formats):
        loaded(TOKENS)  # decompresses
        for name in list_weights(reference.model):
            assert torch.equal(loaded.get_parameter(name), reference.model.get_parameter(name)), name
        without = reference.model(TOKENS).logits
        with simulated_activations(reference.model, scheme):
            expected = reference.model(TOKENS).logits
        # The library's product of code and scale is the same number: no tolerance.
        assert torch.equal(loaded(TOKENS).logits, expected)
    assert not torch.equal(expected, without)
    stored = load_file(next((tmp_path / "out").glob("*.safetensors")))
    integers = weights == "int8_channel_sym" and activation.startswith("int8")
    second = linear[1].parameter.removesuffix(".weight")
    assert (f"{second}.weight" in stored) == integers and (f"{second}.input_scale" in stored) == (scale is not None)
    assert f"{linear[0].parameter.removesuffix('.weight')}.weight_packed" in stored


@pytest.mark.parametrize(
    ("exporter", "weights", "activation", "message"),
    [
        ("compressed-tensors", "bf16", "int8_token", "got 'int8_token' with 'bf16' in"),
        ("compressed-tensors", "int8_channel_sym", "int8_channel_static", "Scales for each channel cannot be written"),
        (
            VLLM,
            "int4_g32_sym",
            "int8_token",
            "this engine runs int8_channel_sym with int8_token, int8_tensor_static alone",
        ),
        ("llama.cpp", "bf16", "int8_token", "can be written by compressed-tensors, compressed-tensors for vLLM alone"),
    ],
)
def test_activations_that_cannot_be_written(
    exporter: str, weights: str, activation: str, message: str, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    reference = load_reference(str(tiny_llama_dir))
    formats = {n: weights if w.kind == "linear" else "bf16" for n, w in list_weights(reference.model).items()}
    width = reference.model.model.layers[0].mlp.down_proj.in_features
    scheme = {"model.layers.0.mlp.down_proj": (activation, [1.0] * width if "static" in activation else None)}
    with pytest.raises(ValueError, match=message):
        export(reference, formats, tmp_path / "out", exporter=exporter, activations=scheme)
    assert not (tmp_path / "out").exists()
