"""ONNX graphs, judged by ONNX Runtime and by OpenVINO that run them.

Both compute in float32 (OpenVINO where it is told not to round inputs to 8 bits), so that their logits differ from ours
by the order of sums alone: some 1e-6 of logits near 3.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from runtime.apply import simulated_formats
from runtime.exporters import export
from runtime.exporters.onnx_model import onnx_fixed_bytes
from runtime.formats import find_format
from runtime.loading import ReferenceModel, load_reference
from runtime.units import list_weights
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral, save_model

MENU = ("int4_g32", "int2_g16_sym", "int8_g64", "bf16", "int4_g64_sym", "int2_g32", "int8_g32_sym", "fp16")
TOKENS = torch.randint(0, VOCABULARY_SIZE, (2, 12), generator=torch.Generator().manual_seed(0))
MOST_DIFFERENCE = 1e-5
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def build_qwen2() -> PreTrainedModel:
    """Returns a tiny Qwen2, whose query, key and value projections have biases."""
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    torch.nn.init.normal_(model.get_parameter("model.layers.0.self_attn.q_proj.bias"))
    return model


# Model, format of its embedding.
CASES: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "llama": (build_tiny_llama, "bf16"),
    "tied llama with biases": (lambda: build_tiny_llama(tied=True, attention_bias=True, key_value_heads=1), "fp16"),
    "tied at 4 bits": (lambda: build_tiny_llama(tied=True), "int4_g32_sym"),
    "tied at 8 bits with zero points": (lambda: build_tiny_llama(tied=True), "int8_g16"),
    "qwen2": (build_qwen2, "int4_g32"),
}


def mix(reference: ReferenceModel, embedding: str) -> dict[str, str]:
    """Returns formats in turn, one of its own for the embedding."""
    weights = list_weights(reference.model).items()
    return {name: embedding if w.kind == "embedding" else MENU[i % len(MENU)] for i, (name, w) in enumerate(weights)}


def feed(reference: ReferenceModel, tokens: torch.Tensor, past: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the inputs of a pass over tokens [B, T] after a past."""
    config: Any = reference.model.config
    names = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    empty = np.zeros((len(tokens), config.num_key_value_heads, 0, head_dim), dtype=np.float32)
    states = {f"past_key_values.{name}": empty if past is None else past[f"present.{name}"] for name in names}
    length = tokens.shape[1] + next(iter(states.values())).shape[2]
    return {"input_ids": tokens.numpy(), "attention_mask": np.ones((len(tokens), length), dtype=np.int64), **states}


def our_logits(reference: ReferenceModel, formats: dict[str, str]) -> NDArray[np.float32]:
    with torch.no_grad(), simulated_formats(reference.model, formats):
        logits: NDArray[np.float32] = reference.model(TOKENS).logits.numpy()
    return logits


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ReferenceModel, dict[str, str]]:
    build, embedding = request.param
    reference = load_reference(str(save_model(build(), tmp_path / "model")))
    return reference, mix(reference, embedding)


def test_onnx_runtime_runs_the_graph(case: tuple[ReferenceModel, dict[str, str]], tmp_path: Path) -> None:
    reference, formats = case
    export(reference, formats, tmp_path / "out", exporter="onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    names, ours = [output.name for output in session.get_outputs()], our_logits(reference, formats)
    [logits, *_] = session.run(None, feed(reference, TOKENS))
    np.testing.assert_allclose(logits, ours, rtol=0, atol=MOST_DIFFERENCE)
    # The same in two steps, the second with what the first has kept.
    past = dict(zip(names, session.run(None, feed(reference, TOKENS[:, :7])), strict=True))
    [last, *_] = session.run(None, feed(reference, TOKENS[:, 7:8], past))
    np.testing.assert_allclose(last[:, 0], ours[:, 7], rtol=0, atol=MOST_DIFFERENCE)


def test_each_node_has_its_format_and_bytes_are_known(
    case: tuple[ReferenceModel, dict[str, str]], tmp_path: Path
) -> None:
    reference, formats = case
    export(reference, formats, tmp_path / "out", exporter="onnx")
    nodes = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node
    readers = {i.removesuffix(".codes"): n for n in nodes if n.op_type == "MatMulNBits" for i in n.input}
    weights = list_weights(reference.model)
    looked_up = [a.i for n in nodes if n.op_type == "GatherBlockQuantized" for a in n.attribute if a.name == "bits"]
    for name, weight in weights.items():
        format_ = find_format(formats[name])
        if weight.kind == "embedding":
            assert looked_up == ([] if format_.unquantized else [format_.bits])
            if not weight.aliases:
                continue
        assert (name in readers) == (not format_.unquantized)
        if name in readers:
            found = {a.name: a.i for a in readers[name].attribute}
            assert (found["bits"], found["block_size"]) == (format_.bits, format_.group_size)
            assert len(readers[name].input) == (3 if format_.symmetric else 4)
    expected = sum(find_format(formats[name]).storage_bytes(weight.shape) for name, weight in weights.items())
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size == expected + onnx_fixed_bytes(reference)


@pytest.mark.parametrize("name", ["llama", "tied llama with biases"])
def test_openvino_runs_the_same_graph(name: str, tmp_path: Path) -> None:
    build, embedding = CASES[name]
    reference = load_reference(str(save_model(build(), tmp_path / "model")))
    formats = mix(reference, embedding)
    export(reference, formats, tmp_path / "out", exporter="onnx")
    model = openvino.Core().compile_model(tmp_path / "out" / "model.onnx", "CPU", EXACT)
    logits = model(feed(reference, TOKENS[:1]))["logits"]
    np.testing.assert_allclose(logits, our_logits(reference, formats)[:1], rtol=0, atol=MOST_DIFFERENCE)
    kinds = {node.get_element_type().get_type_name() for node in model_constants(tmp_path / "out" / "model.onnx")}
    assert {"u2", "u4", "u8"} <= kinds


def model_constants(path: Path) -> list[Any]:
    """Returns the constants of a graph as OpenVINO reads it."""
    return [node for node in openvino.Core().read_model(path).get_ops() if node.get_type_name() == "Constant"]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_reference(str(save_model(build_tiny_llama(), tmp_path / "model")))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"need the package onnx: it is not installed. .*bitplan\[onnx\]"):
        export(reference, mix(reference, "bf16"), tmp_path / "out", exporter="onnx")
    assert not (tmp_path / "out").exists()


def test_other_layers_are_refused(tmp_path: Path) -> None:
    reference = load_reference(str(save_model(build_tiny_mixtral(), tmp_path / "model")))
    formats = dict.fromkeys(list_weights(reference.model), "bf16")
    with pytest.raises(ValueError, match=r"one of llama, mistral, qwen2 without a sliding window .*: got 'mixtral'"):
        export(reference, formats, tmp_path / "out", exporter="onnx")
    with pytest.raises(ValueError, match="to be written as ONNX: got 'mixtral'"):
        onnx_fixed_bytes(reference)
