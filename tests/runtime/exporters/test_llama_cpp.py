"""GGUF files, judged by llama.cpp that runs them and by the package gguf that reads them back.

llama.cpp rounds the inputs of a matrix in blocks to 8 bits, so its logits differ from ours by about 1/127 of what one
rounding step does to a sum of many products; the divergence stays far below what the formats themselves cost.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from runtime.apply import simulated_formats
from runtime.exporters import export
from runtime.exporters.gguf_metadata import PRE_TOKENIZERS, find_pre_tokenizer
from runtime.exporters.llama_cpp import llama_cpp_fixed_bytes
from runtime.formats import find_format
from runtime.loading import ReferenceModel, load_reference
from runtime.units import list_weights, read_weight
from tests.llama_cpp_client import loaded
from tests.tiny_models import (
    VOCABULARY_SIZE,
    build_tiny_llama,
    build_tiny_mixtral,
    build_tiny_qwen_moe,
    sample_text,
    save_model,
)

MENU = (
    "int4_g32_sym",
    "q4_1",
    "int5_g32_sym",
    "q5_0",
    "int8_g32_sym",
    "fp16",
    "q8_0",
    "bf16",
    "q4_0",
    "q5_1",
    "mxfp4",
    "iq4_nl",
)
OURS = {"int4_g32_sym": "Q4_0", "int5_g32_sym": "Q5_0", "int8_g32_sym": "Q8_0", "fp16": "F16", "bf16": "BF16"}
TYPES = {name: OURS.get(name, name.upper()) for name in MENU}
# Measured: 6e-5 to 8e-5 nats on these models, whose plans cost 2e-2 and more.
MOST_KL = 2e-4


def build_llama_3() -> PreTrainedModel:
    """Returns a Llama whose slow rotations are slowed further from 16 positions on."""
    model = build_tiny_llama()
    rope = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model.config.rope_parameters = {**rope, "original_max_position_embeddings": 16}
    scaled = LlamaForCausalLM(model.config).eval()
    scaled.load_state_dict(model.state_dict())
    return scaled


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": build_tiny_llama,
    "tied llama with biases": lambda: build_tiny_llama(tied=True, attention_bias=True, key_value_heads=1),
    "llama 3.1": lambda: build_llama_3(),
    "mixtral": build_tiny_mixtral,
    "qwen2 mixture": build_tiny_qwen_moe,
}


def mix(model: torch.nn.Module) -> dict[str, str]:
    """Returns formats in turn, one for all experts of a projection."""
    parameters = list(dict.fromkeys(weight.parameter for weight in list_weights(model).values()))
    return {name: MENU[parameters.index(w.parameter) % len(MENU)] for name, w in list_weights(model).items()}


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ReferenceModel:
    return load_reference(str(save_model(request.param(), tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def exported(reference: ReferenceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gguf") / "out"
    export(reference, mix(reference.model), directory, exporter="llama.cpp")
    return directory


def test_llama_cpp_runs_the_file(reference: ReferenceModel, exported: Path) -> None:
    tokens = torch.tensor(reference.tokenizer(sample_text(300)).input_ids)
    with torch.no_grad(), simulated_formats(reference.model, mix(reference.model)):
        ours = reference.model(tokens[None]).logits[0].log_softmax(-1)
    with loaded(exported / "model.gguf") as engine:
        theirs = torch.from_numpy(engine.logits(tokens.numpy())).log_softmax(-1)
    # The median: a token on the edge between two experts may take the other one there.
    assert float((ours.exp() * (ours - theirs)).sum(-1).median()) < MOST_KL
    with torch.no_grad():
        unquantized = reference.model(tokens[None]).logits[0].log_softmax(-1)
    assert float((unquantized.exp() * (unquantized - ours)).sum(-1).median()) > 10 * MOST_KL


def test_texts_are_cut_alike(reference: ReferenceModel, exported: Path) -> None:
    text = "The compiler's 2024 files,  isn't it?\n\n\tMemory is cheap: \u00e9\u00df\u4e2d \U0001f600 x=1;"
    with loaded(exported / "model.gguf") as engine:
        assert engine.tokenize(text) == reference.tokenizer(text).input_ids


def test_every_tensor_holds_the_planned_numbers(reference: ReferenceModel, exported: Path) -> None:
    formats = mix(reference.model)
    read = {t.name: t for t in GGUFReader(exported / "model.gguf").tensors}
    lines = dict(line.split("=") for line in (exported / "tensor-types.txt").read_text().splitlines())
    expected: dict[str, list[Tensor]] = {}
    with simulated_formats(reference.model, formats):
        for name, weight in list_weights(reference.model).items():
            for tensor_name, rows in list_parts(reference, weight.parameter, read_weight(reference.model, weight)):
                expected.setdefault(tensor_name, []).append(rows.clone())
                assert read[tensor_name].tensor_type.name == TYPES[formats[name]]
                assert lines["^" + re.escape(tensor_name) + "$"] == TYPES[formats[name]].lower()
    assert len(lines) == len(expected)
    for name, matrices in expected.items():
        found = dequantize(read[name].data, read[name].tensor_type)
        # A sum of nothing: the product scale * code is taken in float32 by both.
        assert np.array_equal(found.reshape(-1, found.shape[-1]), torch.cat(matrices).numpy()), name
    others = [tensor for name, tensor in read.items() if name not in expected]
    assert ("rope_freqs.weight" in read) == (reference.model.config.rope_parameters["rope_type"] == "llama3")
    assert {tensor.tensor_type for tensor in others} == {GGMLQuantizationType.F32}


def list_parts(reference: ReferenceModel, parameter: str, values: Tensor) -> list[tuple[str, Tensor]]:
    """Returns the tensors of a parameter as llama.cpp's documentation has them, independent of the exporter."""
    part = parameter.removesuffix(".weight")
    if part in ("model.embed_tokens", "lm_head"):
        return [({"model.embed_tokens": "token_embd", "lm_head": "output"}[part] + ".weight", values)]
    layer, role = part.split(".")[2], part.split(".")[-1]
    config = reference.model.config
    if role in ("q_proj", "k_proj") and config.model_type in ("llama", "mixtral"):
        heads = config.num_attention_heads if role == "q_proj" else config.num_key_value_heads
        # Pair i of a head is (i, i + half) for transformers and (2 i, 2 i + 1) for llama.cpp.
        half = len(values) // heads // 2
        order = [head * 2 * half + i + j * half for head in range(heads) for i in range(half) for j in (0, 1)]
        values = values[order]
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    ending = "_exps" if "experts" in part and "shared" not in part else "_shexp" if "shared_expert" in part else ""
    names |= {f"{kind}_proj": f"ffn_{kind}{ending}" for kind in ("gate", "up", "down")}
    if role == "gate_up_proj":
        half = len(values) // 2
        return [(f"blk.{layer}.ffn_{k}_exps.weight", v) for k, v in (("gate", values[:half]), ("up", values[half:]))]
    return [(f"blk.{layer}.{names[role]}.weight", values)]


def test_bytes_are_known_beforehand(reference: ReferenceModel, exported: Path) -> None:
    formats, weights = mix(reference.model), list_weights(reference.model)
    expected = sum(find_format(formats[name]).storage_bytes(weight.shape) for name, weight in weights.items())
    assert (exported / "model.gguf").stat().st_size == expected + llama_cpp_fixed_bytes(reference)


def test_names_of_types_are_anchored(exported: Path) -> None:
    # llama-quantize searches anywhere in a name and takes the first match: blk.1 would match blk.11 as well.
    for line in (exported / "tensor-types.txt").read_text().splitlines():
        assert re.fullmatch(r"\^[a-z0-9_\\.]+\$=[a-z0-9_]+", line), line
        assert not re.search(line.partition("=")[0], "blk.11.attn_q.weight.weight")


def test_blocks_of_256_run_as_well(tmp_path: Path) -> None:
    # Rows of 256 and 512, the least that hold such blocks.
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.05,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    reference = load_reference(str(save_model(LlamaForCausalLM(config).eval(), tmp_path / "model")))
    menu = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs")
    formats = {name: menu[i % 6] for i, name in enumerate(list_weights(reference.model))}
    export(reference, formats, tmp_path / "out", exporter="llama.cpp")
    read = {t.name: t for t in GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert {t.tensor_type.name for t in read.values()} == {*(name.upper() for name in menu), "F32"}
    tokens = torch.tensor(reference.tokenizer(sample_text(200)).input_ids)
    with torch.no_grad(), simulated_formats(reference.model, formats):
        values = reference.model.get_parameter("model.layers.0.mlp.down_proj.weight").numpy()
        down = read["blk.0.ffn_down.weight"]
        assert np.array_equal(dequantize(down.data, down.tensor_type), values)
        ours = reference.model(tokens[None]).logits[0].log_softmax(-1)
    with loaded(tmp_path / "out" / "model.gguf") as engine:
        theirs = torch.from_numpy(engine.logits(tokens.numpy())).log_softmax(-1)
    assert float((ours.exp() * (ours - theirs)).sum(-1).median()) < MOST_KL


def test_refusals(tmp_path: Path) -> None:
    reference = load_reference(str(save_model(build_tiny_mixtral(), tmp_path / "model")))
    formats = mix(reference.model)
    first = next(name for name in formats if "experts" in name)
    mixed = {**dict.fromkeys(formats, "int4_g32_sym"), first: "fp16"}
    with pytest.raises(ValueError, match=r"one type: got F16 and Q4_0 in 'blk\.0\.ffn_\w+_exps\.weight'"):
        export(reference, mixed, tmp_path / "a", exporter="llama.cpp")
    with pytest.raises(ValueError, match="one that llama.cpp stores bit for bit: got 'int3_g64' for weight"):
        export(reference, {**formats, first: "int3_g64"}, tmp_path / "a", exporter="llama.cpp")
    reference.model.config.rope_parameters["rope_type"] = "yarn"
    with pytest.raises(ValueError, match="among default, llama3 to be written as GGUF: got rope_type='yarn'"):
        export(reference, formats, tmp_path / "a", exporter="llama.cpp")
    reference.model.config.model_type = "gpt_neox"
    with pytest.raises(ValueError, match=r"one of llama, .*: got 'gpt_neox'\. Convert it with llama.cpp's own"):
        export(reference, formats, tmp_path / "a", exporter="llama.cpp")
    assert not (tmp_path / "a").exists()


def test_tokenizers_that_llama_cpp_cuts_otherwise_are_refused() -> None:
    level = {"type": "ByteLevel", "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert find_pre_tokenizer({"model": {"type": "BPE"}, "pre_tokenizer": level}) == "gpt-2"
    chain = {"type": "Sequence", "pretokenizers": [digits, level]}
    assert find_pre_tokenizer({"model": {"type": "BPE"}, "pre_tokenizer": chain}) == "smollm"
    split = {"type": "Split", "pattern": {"Regex": next(k[0] for k, v in PRE_TOKENIZERS.items() if v == "llama-bpe")}}
    chain = {"type": "Sequence", "pretokenizers": [split, {**level, "use_regex": False}]}
    assert find_pre_tokenizer({"model": {"type": "BPE"}, "pre_tokenizer": chain}) == "llama-bpe"
    for document in (
        {"model": {"type": "Unigram"}, "pre_tokenizer": level},
        {"model": {"type": "BPE", "byte_fallback": True}, "pre_tokenizer": level},
        {"model": {"type": "BPE"}, "pre_tokenizer": {**digits, "individual_digits": False}},
        {"model": {"type": "BPE"}, "pre_tokenizer": None},
    ):
        with pytest.raises(ValueError, match="a byte-level BPE that llama.cpp cuts texts for alike"):
            find_pre_tokenizer(json.loads(json.dumps(document)))
