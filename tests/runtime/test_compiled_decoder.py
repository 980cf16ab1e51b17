"""The compiled decoder against the same model run module by module, and against float64."""

import copy
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from runtime.apply import apply_formats_
from runtime.compiled_decoder import begin_sequence, install_compiled_decoder_
from runtime.decoder_cache import DecoderCache
from runtime.decoder_run import run_tokens
from runtime.decoder_tensors import NotCompiled, compile_decoder
from runtime.kernels.cpu import load_kernels
from runtime.kernels.decoder_step import _Step
from runtime.kernels.dispatch import kernel_path, selected_kernels
from runtime.units import list_weights
from runtime.weight_memory import gather_weights_
from tests.nan_outputs import nan_filled_outputs
from tests.runtime.kernels.stored_weights import available_kernels
from tests.tiny_models import SIZES, build_model, build_tiny_llama

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler is here")
LEVELS = [kernels.level for kernels in available_kernels()]
FORMATS = (
    "int4_g32",
    "int8_g64_sym",
    "nested4_8_g32",
    "int3_g64",
    "int5_channel",
    "nested8_g64",
    "int2_g32_sym",
    "bf16",
    "nested4_6_channel",
    "mxfp8_e4m3",
    "fp8_e5m2_channel",
    "int4_top12int8_channel",
)


def build(config_class: Any, model_class: Any, **changes: Any) -> Any:
    settings = {**SIZES, "intermediate_size": 128, "tie_word_embeddings": False, **changes}
    return build_model(model_class, config_class(**settings), seed=0)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": build_tiny_llama,
    "llama, tied": lambda: build_tiny_llama(tied=True),
    "llama, biases, one head of keys": lambda: build_tiny_llama(attention_bias=True, key_value_heads=1),
    "llama, five heads of queries to one of keys": lambda: build(
        LlamaConfig, LlamaForCausalLM, hidden_size=320, num_attention_heads=5, num_key_value_heads=1
    ),
    "llama, three heads of queries to one of keys": lambda: build(
        LlamaConfig, LlamaForCausalLM, hidden_size=192, num_attention_heads=6, num_key_value_heads=2
    ),
    "llama, wide heads": lambda: build_tiny_llama(head_dim=80),
    "mistral": lambda: build(MistralConfig, MistralForCausalLM, sliding_window=None),
    "qwen 2": lambda: build(Qwen2Config, Qwen2ForCausalLM),
    "qwen 3": lambda: build(Qwen3Config, Qwen3ForCausalLM, head_dim=32),
    "llama, yarn": lambda: build(
        type(build_tiny_llama().config),
        type(build_tiny_llama()),
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
}


@pytest.fixture(autouse=True)
def outputs_full_of_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nan_filled_outputs(monkeypatch):
        yield


def pack(model: Any) -> Any:
    """Returns the model with packed weights in formats that alternate, and the forward of the compiled decoder."""
    names = [name for name, weight in list_weights(model).items() if weight.kind != "router"]
    apply_formats_(model, {name: FORMATS[i % len(FORMATS)] for i, name in enumerate(names)})
    model.requires_grad_(False)
    assert install_compiled_decoder_(model) is None
    return model


def draw_tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 320, (1, count), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["llama, tied", "qwen 3"])
def test_weights_in_their_execution_layout_give_the_same_text(name: str) -> None:
    model = pack(MODELS[name]())
    tokens, settings = draw_tokens(9), {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 1}
    expected, logits = model.generate(tokens, **settings), run_by_parts(model, tokens, [6, 1, 1, 1])
    if not gather_weights_(model):
        pytest.skip("the system gives no large pages")
    assert torch.equal(model.generate(tokens, **settings), expected)
    # Activations of 15 bits in place of 16 where few tokens meet few bits.
    assert (run_by_parts(model, tokens, [6, 1, 1, 1]) - logits).norm() <= 1e-3 * logits.norm()


def test_formats_that_are_not_integers_run_in_execution_layouts() -> None:
    formats = (
        "mxfp4",
        "nvint4",
        "q4_1",
        "bitmod3_g32",
        "int4_g32_pow2",
        "ternary_g32",
        "nvfp4",
        "fp6_e2m3_g64",
        "q8_0",
        "bcq3_g64",
        "fp6_e3m2_g32",
        "int2_mix25int4_g32_outliers",
        "fp8_g32",
    )
    model = build_tiny_llama()
    names = [name for name, weight in list_weights(model).items() if weight.kind != "router"]
    apply_formats_(model, {name: formats[i % len(formats)] for i, name in enumerate(names)})
    model.requires_grad_(False)
    assert "in a format that the kernels read" in str(install_compiled_decoder_(model))
    tokens = draw_tokens(24)
    expected = run_in_float64(model, tokens)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if not gather_weights_(model):
        pytest.skip("the system gives no large pages")
    assert install_compiled_decoder_(model) is None
    compiled = run_by_parts(model, tokens, [9, 1, 1, 3, 1, 7, 1, 1])
    assert (compiled.double() - expected).norm() <= 1e-3 * expected.norm()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    # Other numbers in the stored tensors are not missed.
    changed = next(name for name in stored if name.endswith("q_proj.weight.codes"))
    model.load_state_dict({**stored, changed: stored[changed] ^ 1})
    with kernel_path("reference"):
        expected = model(tokens, use_cache=False).logits[0]
    assert (model(tokens, use_cache=False).logits[0] - expected).norm() <= 1e-3 * expected.norm()


def run_by_parts(model: Any, tokens: Tensor, parts: list[int]) -> Tensor:
    """Returns the logits [T, V] of tokens that are given to the model in parts, by the compiled decoder."""
    cache: Any = DynamicCache()
    logits = []
    for part in torch.split(tokens, parts, dim=1):
        output = model(part, past_key_values=cache)
        cache = output.past_key_values
        assert isinstance(cache, DecoderCache)
        logits.append(output.logits[0])
    return torch.cat(logits)


def run_in_float64(model: Any, tokens: Tensor) -> Tensor:
    """Returns the logits [T, V] with the packed weights' values in float64."""
    with kernel_path("reference"):
        logits: Tensor = copy.deepcopy(model).double()(tokens, use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_as_near_to_float64_as_those_of_the_modules(name: str, level: str) -> None:
    model = pack(MODELS[name]())
    tokens = draw_tokens(39)
    expected = run_in_float64(model, tokens)
    with kernel_path(level):
        # Without a cache the model's own forward runs: the same products of the same kernels.
        modules = model(tokens, use_cache=False).logits[0]
        compiled = run_by_parts(model, tokens, [9, 1, 1, 3, 1, 7, 1, 1, 15])
    allowed = (modules.double() - expected).norm()
    # Roundings of another order are another draw of the same error, and float32 itself adds some.
    assert (compiled.double() - expected).norm() <= 2 * allowed + 1e-5 * expected.norm()
    assert allowed <= 2e-3 * expected.norm()


def test_texts_longer_than_a_part_of_the_prompt_and_than_the_first_cache() -> None:
    model = pack(build_tiny_llama())
    tokens = draw_tokens(530)
    expected = run_in_float64(model, tokens)
    compiled = run_by_parts(model, tokens, [520, 1, 9])
    assert (compiled.double() - expected).norm() <= 1e-3 * expected.norm()
    last = model(tokens, past_key_values=DynamicCache(), logits_to_keep=3).logits
    assert last.shape == (1, 3, 320)
    assert torch.allclose(last[0], compiled[-3:], atol=1e-3)


@pytest.mark.parametrize("name", ["llama, tied", "qwen 3"])
def test_generation_gives_the_text_of_the_reference(name: str) -> None:
    model = pack(MODELS[name]())
    tokens, settings = draw_tokens(9), {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 1}
    with kernel_path("reference"):
        expected = model.generate(tokens, **settings)
    output = model.generate(tokens, **settings, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert isinstance(output.past_key_values, DecoderCache)
    # Several tokens at a time, some of which are taken back.
    assert torch.equal(model.generate(tokens, **settings, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("name", ["llama", "llama, three heads of queries to one of keys"])
def test_threads_do_not_change_the_logits(name: str) -> None:
    model = pack(MODELS[name]())
    tokens, threads = draw_tokens(40), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run_by_parts(model, tokens, [30, 1, 1, 8]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_sequence_goes_on_in_either_way() -> None:
    model = pack(build_tiny_llama())
    tokens = draw_tokens(16)
    expected = run_by_parts(model, tokens, [16])
    with kernel_path("reference"):
        begun = model(tokens[:, :6], past_key_values=DynamicCache()).past_key_values
    assert type(begun) is DynamicCache
    second = model(tokens[:, 6:11], past_key_values=begun)
    assert isinstance(second.past_key_values, DecoderCache)
    with kernel_path("reference"):
        third = model(tokens[:, 11:], past_key_values=second.past_key_values)
    assert third.past_key_values.get_seq_length() == 16
    assert torch.allclose(torch.cat([second.logits[0], third.logits[0]]), expected[6:], atol=2e-3)


def test_what_is_not_one_plain_sequence_runs_module_by_module() -> None:
    model = pack(build_tiny_llama())
    tokens = draw_tokens(6)
    padded = torch.tensor([[0, 1, 1, 1, 1, 1]])
    cases: list[dict[str, Any]] = [
        {"input_ids": tokens.repeat(2, 1)},
        {"input_ids": tokens, "attention_mask": padded},
        {"input_ids": tokens, "output_hidden_states": True},
        {"input_ids": tokens, "position_ids": torch.arange(3, 9)[None]},
        {"inputs_embeds": torch.zeros(1, 6, 64)},
    ]
    for case in cases:
        assert type(model(**case, past_key_values=DynamicCache()).past_key_values) is DynamicCache
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(NotCompiled, match=r"modules must have no hooks.*on 'model.layers.1.mlp'"):
        compile_decoder(model)
    assert type(model(tokens, past_key_values=DynamicCache()).past_key_values) is DynamicCache
    hook.remove()
    assert type(model(tokens, past_key_values=DynamicCache()).past_key_values) is DecoderCache
    beams = model.generate(tokens, max_new_tokens=5, num_beams=2, do_sample=False, pad_token_id=1)
    assert beams.shape == (1, 11)


def test_the_cache_holds_one_sequence() -> None:
    model = pack(build_tiny_llama())
    cache: Any = model(draw_tokens(5), past_key_values=DynamicCache()).past_key_values
    with pytest.raises(ValueError, match="this cache must be given one sequence: got 2"):
        model(draw_tokens(1).repeat(2, 1), past_key_values=cache)
    cache.crop(-2)
    assert cache.get_seq_length() == 3
    cache.reset()
    assert cache.get_seq_length() == 0


def test_weights_that_were_replaced_are_read_from_the_next_text_on() -> None:
    model, tokens = pack(build_tiny_llama()), draw_tokens(5)
    before = run_by_parts(model, tokens, [5])
    state = {name: t.clone() for name, t in model.state_dict().items()}
    state["model.layers.0.mlp.up_proj.weight.scale"] *= 3
    model.load_state_dict(state, assign=True)
    after = run_by_parts(model, tokens, [5])
    assert not torch.allclose(before, after, atol=1e-2)
    assert torch.allclose(after, model(tokens, use_cache=False).logits[0], atol=2e-3)


def test_steps_without_memory_are_refused() -> None:
    model = pack(build_tiny_llama())
    kernels = selected_kernels()
    assert kernels is not None
    step = _Step(0, 0, 0, 0, 0, 0, 2**44, 0, 2**44, 1)
    with pytest.raises(MemoryError, match="memory for the states of the tokens must be there"):
        kernels.step(compile_decoder(model)._view, step)


def test_no_gradient_is_kept() -> None:
    model = pack(build_tiny_llama())
    cache = model(draw_tokens(4), past_key_values=DynamicCache()).past_key_values
    assert not run_tokens(model, cache, draw_tokens(1), wanted=1).requires_grad
    assert ctypes.sizeof(_Step) == 112


@pytest.mark.parametrize("format_name", ["int4_g32", "int8_channel", "int1_g64", "mxfp4", "bf16"])
def test_tokens_are_embedded_as_their_module_does(format_name: str) -> None:
    model = build_tiny_llama()
    formats = dict.fromkeys(list_weights(model), "int8_g32") | {"model.embed_tokens.weight": format_name}
    apply_formats_(model, formats)
    assert install_compiled_decoder_(model) is None
    model.model.embed_tokens.scale = 1.7
    cache: Any = begin_sequence(model)
    assert (cache.decoder.tensors.embedding is None) == (format_name in ("mxfp4", "bf16"))
    tokens = draw_tokens(7)
    embedded = [model.model.embed_tokens(part)[0] for part in tokens.split([1, 5, 1], dim=1)]
    expected = run_embedded(model, embedded)
    found = [run_tokens(model, cache, part, wanted=part.shape[1]) for part in tokens.split([1, 5, 1], dim=1)]
    assert torch.equal(torch.cat(found), expected)
    short = run_tokens(model, begin_sequence(model), tokens.to(torch.int32), wanted=7)
    assert torch.allclose(short, expected, atol=1e-3)


def run_embedded(model: Any, parts: list[Tensor]) -> Tensor:
    """Returns the logits of parts of a text that are given as embeddings."""
    cache: Any = begin_sequence(model)
    kernels, logits = selected_kernels(), []
    positions = torch.arange(sum(map(len, parts)))[None]
    cosine, sine = (table[0].contiguous() for table in model.model.rotary_emb(parts[0], positions))
    for part in parts:
        place = slice(cache.length, cache.length + len(part))
        logits.append(cache.run(kernels, part, (cosine[place], sine[place]), len(part)))
    return torch.cat(logits)


@pytest.mark.parametrize("token", [-400, 320, 2**40])
@pytest.mark.parametrize("count", [1, 3])
def test_tokens_outside_the_vocabulary_are_refused(token: int, count: int) -> None:
    model = pack(build_tiny_llama())
    cache: Any = begin_sequence(model)
    with pytest.raises(IndexError):
        run_tokens(model, cache, torch.tensor([[5] * (count - 1) + [token]]), wanted=1)
    assert cache.length == 0
