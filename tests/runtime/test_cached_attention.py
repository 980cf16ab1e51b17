"""Attention over a quantized past in one pass: equal to decoding token by token, and to the formula written out."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from runtime.cache_formats import CACHE_FORMATS
from runtime.cache_units import find_cache_units
from runtime.cached_attention import (
    AttentionShape,
    CacheFormats,
    attend,
    attend_past,
    measure_attention_shapes,
    simulated_cache,
    split_cache_formats,
)
from runtime.formats import find_format
from runtime.past_states import render_past
from runtime.quantized_cache import QuantizedCache
from runtime.rendering import render
from tests.runtime.format_mixes import TOKENS, build_tiny_gemma
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral, build_tiny_qwen_moe

KEYS_0, VALUES_0 = "model.layers.0.self_attn.key_cache", "model.layers.0.self_attn.value_cache"
# In float64 both ways sum the same numbers in another order: some 1e3 operations of relative error 1e-16 on logits of
# size 10, unless a rounding to a code tips over, which a different sum of 1e-15 does not bring about here.
SUMMING = 1e-11

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": build_tiny_llama,
    "one key head": lambda: build_tiny_llama(key_value_heads=1),
    "as many key heads as heads": lambda: build_tiny_llama(key_value_heads=4, attention_bias=True),
    "mixtral": build_tiny_mixtral,
    "qwen_moe": build_tiny_qwen_moe,
}


def draw_cache_formats(model: nn.Module, *names: str) -> dict[str, str]:
    """Returns a format for every cache of a model, in turn."""
    return {unit.name: names[i % len(names)] for i, unit in enumerate(find_cache_units(model))}


def decode(model: nn.Module, tokens: Tensor, formats: dict[str, str]) -> Tensor:
    """Returns the logits of decoding token by token with the packed cache."""
    cache = QuantizedCache(model, formats)
    steps = [model(token[:, None], past_key_values=cache, use_cache=True).logits for token in tokens.unbind(1)]
    return torch.cat(steps, dim=1)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_one_pass_gives_the_logits_of_decoding_token_by_token(name: str) -> None:
    model = MODELS[name]().double()
    model.config._experts_implementation = "eager"  # the batched ones are not there in float64
    formats = draw_cache_formats(model, "int3_channel", "int4_channel_sym", "bf16", "int2_channel")
    with simulated_cache(model, formats):
        simulated = logits_of(model, TOKENS)
    torch.testing.assert_close(simulated, decode(model, TOKENS, formats), rtol=0, atol=SUMMING)
    assert (simulated - logits_of(model, TOKENS)).abs().max() > 1e-3


@torch.no_grad()
def test_groups_inside_a_head_are_decoded_alike() -> None:
    model = build_tiny_llama(head_dim=64).double()
    formats = draw_cache_formats(model, "int2_g32", "int5_g64_sym", "int4_g32", "int8_channel")
    with simulated_cache(model, formats):
        simulated = logits_of(model, TOKENS)
    torch.testing.assert_close(simulated, decode(model, TOKENS, formats), rtol=0, atol=SUMMING)


@torch.no_grad()
@pytest.mark.parametrize("names", [("int3_t32", "int2_t32"), ("int4_t32", "int3_channel"), ("bf16", "int2_t64")])
def test_blocks_of_tokens_are_decoded_alike(names: tuple[str, str]) -> None:
    model = build_tiny_llama().double()
    tokens = torch.arange(2 * 70).mul(7).remainder(VOCABULARY_SIZE).view(2, 70)
    formats = draw_cache_formats(model, *names)
    with simulated_cache(model, formats):
        simulated = logits_of(model, tokens)
    torch.testing.assert_close(simulated, decode(model, tokens, formats), rtol=0, atol=SUMMING)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 70])
def test_tokens_see_complete_blocks_packed_and_the_others_in_float16(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    query, key, value = torch.randn(3, 1, 2, tokens, 8, generator=generator, dtype=torch.float64).unbind(0)
    format_ = CACHE_FORMATS["int3_t32"]
    output = attend_past(query, key, value, CacheFormats(keys=format_, values=format_), None, 0.3)
    half = [states.half().double() for states in (key, value)]
    for h, t in torch.cartesian_prod(torch.arange(2), torch.arange(tokens)).tolist():
        seen = []
        for exact, recent in zip((key, value), half, strict=True):
            past = recent[0, h, :t].clone()
            for start in range(0, t - t % 32, 32):
                channels = recent[0, h, start : start + 32].T
                past[start : start + 32] = render(channels, find_format("int3_channel")).T
            seen.append(torch.cat([past, exact[0, h, t : t + 1]]))
        expected = torch.softmax(0.3 * seen[0] @ query[0, h, t], dim=0) @ seen[1]
        torch.testing.assert_close(output[0, h, t], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (6, 2)])
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_output_is_the_formula_written_out(heads: tuple[int, int], tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)

    def draw(count: int) -> Tensor:
        return torch.randn(2, count, tokens, 24, generator=generator, dtype=torch.float64)

    query, key, value = draw(heads[0]), draw(heads[1]), draw(heads[1])
    formats = CacheFormats(keys=find_format("int3_channel"), values=find_format("int4_channel_sym"))
    output = attend_past(query, key, value, formats, None, 0.3)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, (2, heads[0], tokens))).tolist():
        own = h // (heads[0] // heads[1])
        past = [render(x[b, own], f).double() for x, f in ((key, formats.keys), (value, formats.values)) if f]
        keys = torch.cat([past[0][:t], key[b, own, t : t + 1]])
        values = torch.cat([past[1][:t], value[b, own, t : t + 1]])
        expected = torch.softmax(0.3 * keys @ query[b, h, t], dim=0) @ values
        torch.testing.assert_close(output[b, h, t], expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing() -> None:
    model = build_tiny_llama().double()
    padded = torch.cat([torch.ones(2, 3, dtype=torch.int64), TOKENS], dim=1)
    seen = torch.ones_like(padded)
    seen[:, :3] = 0
    with simulated_cache(model, draw_cache_formats(model, "int3_channel")):
        alone = logits_of(model, TOKENS)
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        beside = model(padded, attention_mask=seen, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(beside[:, 3:], alone, rtol=0, atol=SUMMING)
    assert bool(torch.isfinite(beside).all())


@torch.no_grad()
def test_a_token_sees_itself_as_it_is_and_nothing_after_it() -> None:
    model = build_tiny_llama()
    formats = draw_cache_formats(model, "int2_channel")
    reference = logits_of(model, TOKENS)
    changed = TOKENS.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % VOCABULARY_SIZE
    with simulated_cache(model, formats):
        simulated, other = logits_of(model, TOKENS), logits_of(model, changed)
    torch.testing.assert_close(simulated[:, 0], reference[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(simulated[:, :6], other[:, :6], rtol=0, atol=1e-5)


@torch.no_grad()
def test_only_the_named_half_is_quantized() -> None:
    key, value = torch.randn(2, 1, 2, 5, 16).unbind(0)
    states = render_past(key, find_format("int3_channel")).past
    assert torch.equal(states[0, 1, 3], render(key[0, 1, 3:4], find_format("int3_channel"))[0])
    assert render_past(value, None).past is value
    model = build_tiny_llama()
    reference = logits_of(model, TOKENS)
    with simulated_cache(model, {KEYS_0: "int2_channel"}):
        keys = logits_of(model, TOKENS)
    with simulated_cache(model, {VALUES_0: "int2_channel"}):
        values = logits_of(model, TOKENS)
    assert not torch.equal(keys, reference)
    assert not torch.equal(values, reference)
    assert not torch.equal(keys, values)


@torch.no_grad()
def test_the_model_is_left_as_it_was() -> None:
    model = build_tiny_llama()
    reference, implementation = logits_of(model, TOKENS), model.config._attn_implementation

    def fail() -> None:
        with simulated_cache(model, {KEYS_0: "int2_channel"}):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with simulated_cache(model, {}):
        assert torch.equal(logits_of(model, TOKENS), reference)
    assert torch.equal(logits_of(model, TOKENS), reference)
    assert model.config._attn_implementation == implementation
    assert not any("cache_formats" in vars(module) for module in model.modules())


def test_shapes_are_those_that_a_real_cache_holds() -> None:
    config = MistralConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
        sliding_window=None,
    )
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        cache = model(TOKENS, use_cache=True).past_key_values
    held = [(layer.keys.shape[1], layer.keys.shape[3]) for layer in cache.layers]
    expected = tuple(
        AttentionShape(module=f"model.layers.{i}.self_attn", keys=rows, values=rows) for i, rows in enumerate(held)
    )
    assert measure_attention_shapes(model) == expected
    assert not any("attention_observer" in vars(module) for module in model.modules())


def test_formats_of_weights_and_caches_are_told_apart() -> None:
    weights, caches = {"model.embed_tokens.weight": "int4_g64"}, {KEYS_0: "int4_g32", VALUES_0: "bf16"}
    assert split_cache_formats({**caches, **weights}) == (weights, caches)
    assert split_cache_formats({}) == ({}, {})


@pytest.mark.parametrize("name", ["model.layers.7.self_attn.key_cache", "model.layers.0.self_attn.q_proj"])
def test_a_name_that_is_no_cache_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"for caches of the model: got 1 unknown names, first '{name}'"):
        simulated_cache(build_tiny_llama(), {KEYS_0: "bf16", name: "bf16"}).__enter__()


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="a cache format must be a known name: got 'int9'"):
        simulated_cache(build_tiny_llama(), {KEYS_0: "int9"}).__enter__()


def test_attention_with_a_soft_cap_is_refused() -> None:
    with pytest.raises(ValueError, match="a quantized cache needs plain attention: got softcap in Gemma2Attention"):
        measure_attention_shapes(build_tiny_gemma())
    states = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match="got s_aux in Module"):
        attend(nn.Module(), states, states, states, None, s_aux=torch.zeros(1))
