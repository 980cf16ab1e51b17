"""The packed cache: the bytes that are priced, what decoding reads from it, and what generation does with it."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM

from runtime.cache_formats import CACHE_FORMATS, CacheLoad, cache_bytes
from runtime.cache_units import find_cache_units
from runtime.costs import unit_bytes
from runtime.formats import find_format
from runtime.quantized_cache import QuantizedCache
from tests.runtime.format_mixes import TOKENS
from tests.tiny_models import build_tiny_llama

FITTING = ("int2_g32", "int3_g32_sym", "int4_channel", "int5_channel_sym", "int8_g32", "bf16", "fp16")


def formats_of(model: nn.Module, *names: str) -> dict[str, str]:
    return {unit.name: names[i % len(names)] for i, unit in enumerate(find_cache_units(model))}


def logits_after(model: nn.Module, cache: QuantizedCache, tokens: Tensor) -> Tensor:
    logits: Tensor = model(tokens, past_key_values=cache, use_cache=True).logits
    return logits


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return build_tiny_llama(head_dim=32)


@torch.no_grad()
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 13), (2, 7)])
@pytest.mark.parametrize("name", FITTING)
def test_bytes_held_are_the_bytes_priced(name: str, batch: int, tokens: int, model: LlamaForCausalLM) -> None:
    formats = formats_of(model, name, "int3_channel_sym")
    cache = QuantizedCache(model, formats)
    logits_after(model, cache, TOKENS.repeat(1, 2)[:batch, :tokens])
    units = find_cache_units(model)
    assert cache.stored_bytes == sum(
        unit_bytes(u, find_format(formats[u.name]), CacheLoad(context=tokens, batch=batch)) for u in units
    )
    assert cache.get_seq_length() == tokens


@torch.no_grad()
def test_blocks_never_take_more_than_is_priced(model: LlamaForCausalLM) -> None:
    units, formats = find_cache_units(model), formats_of(model, "int2_t32", "int4_t64")
    cache, held = QuantizedCache(model, formats), []
    for token in TOKENS.repeat(1, 6)[:, :70].unbind(1):
        logits_after(model, cache, token[:, None])
        held.append(cache.stored_bytes)
    for context in (1, 31, 32, 33, 64, 70):
        load = CacheLoad(context=context, batch=2)
        priced = sum(unit_bytes(u, CACHE_FORMATS[formats[u.name]], load) for u in units)
        # Keys and values are priced each at its own worst length.
        assert max(held[:context]) <= priced
        exact = sum(cache_bytes(CACHE_FORMATS[formats[u.name]], u.cache_shape or (0, 0), context) for u in units)
        assert held[context - 1] == 2 * exact
    one = QuantizedCache(model, formats_of(model, "int2_t32"))
    held = []
    for token in TOKENS.repeat(1, 6)[:, :70].unbind(1):
        logits_after(model, one, token[:, None])
        held.append(one.stored_bytes)
    for context in (1, 31, 32, 33, 62, 63, 64, 70):
        load = CacheLoad(context=context, batch=2)
        assert max(held[:context]) == sum(unit_bytes(u, CACHE_FORMATS["int2_t32"], load) for u in units)


@torch.no_grad()
def test_an_unquantized_cache_takes_two_bytes_a_number(model: LlamaForCausalLM) -> None:
    cache, plain = QuantizedCache(model, formats_of(model, "bf16")), DynamicCache(config=model.config)
    logits_after(model, cache, TOKENS)
    logits_after(model, plain, TOKENS)
    assert cache.stored_bytes == sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in plain.layers)


@torch.no_grad()
def test_the_tokens_of_a_step_see_each_other_as_they_are(model: LlamaForCausalLM) -> None:
    model = copy.deepcopy(model).double()
    cache = QuantizedCache(model, formats_of(model, "int2_channel"))
    reference = model(TOKENS, use_cache=False).logits
    torch.testing.assert_close(logits_after(model, cache, TOKENS[:, :8]), reference[:, :8], rtol=0, atol=1e-11)
    assert (logits_after(model, cache, TOKENS[:, 8:]) - reference[:, 8:]).abs().max() > 1e-3


@torch.no_grad()
def test_cropped_tokens_have_never_been_there(model: LlamaForCausalLM) -> None:
    formats = formats_of(model, "int3_channel", "int4_channel")
    cropped, never = QuantizedCache(model, formats), QuantizedCache(model, formats)
    logits_after(model, cropped, TOKENS[:, :5])
    logits_after(model, cropped, TOKENS[:, 7:10])
    cropped.crop(-3)
    logits_after(model, never, TOKENS[:, :5])
    assert cropped.stored_bytes == never.stored_bytes
    assert torch.equal(logits_after(model, cropped, TOKENS[:, 5:6]), logits_after(model, never, TOKENS[:, 5:6]))


@torch.no_grad()
def test_reordered_sequences_go_on_where_they_come_from(model: LlamaForCausalLM) -> None:
    formats = formats_of(model, "int3_channel", "int4_channel")
    cache, swapped = QuantizedCache(model, formats), QuantizedCache(model, formats)
    logits_after(model, cache, TOKENS[:, :5])
    cache.reorder_cache(torch.tensor([1, 0]))
    logits_after(model, swapped, TOKENS[:, :5].flip(0))
    assert torch.equal(logits_after(model, cache, TOKENS[:, 5:6]), logits_after(model, swapped, TOKENS[:, 5:6]))


@torch.no_grad()
def test_a_reset_cache_is_empty(model: LlamaForCausalLM) -> None:
    cache = QuantizedCache(model, formats_of(model, "int3_channel"))
    first = logits_after(model, cache, TOKENS[:, :5])
    cache.reset()
    assert (cache.get_seq_length(), cache.stored_bytes, cache.get_max_length()) == (0, 0, -1)
    assert torch.equal(logits_after(model, cache, TOKENS[:, :5]), first)


@torch.no_grad()
def test_greedy_generation_takes_the_most_likely_token_of_every_step(model: LlamaForCausalLM) -> None:
    formats = formats_of(model, "int3_channel", "int2_channel")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    cache = QuantizedCache(model, formats)
    generated = model.generate(TOKENS[:, :5], attention_mask=torch.ones(2, 5), past_key_values=cache, **options)
    by_hand, tokens = QuantizedCache(model, formats), TOKENS[:, :5]
    step = tokens
    for _ in range(6):
        step = logits_after(model, by_hand, step)[:, -1:].argmax(dim=-1)
        tokens = torch.cat([tokens, step], dim=1)
    assert torch.equal(generated, tokens)


@torch.no_grad()
def test_beams_use_it(model: LlamaForCausalLM) -> None:
    beams = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 1}
    exact = model.generate(TOKENS[:, :5], attention_mask=torch.ones(2, 5), **beams)
    cache = QuantizedCache(model, formats_of(model, "int8_channel"))
    assert torch.equal(
        model.generate(TOKENS[:, :5], attention_mask=torch.ones(2, 5), past_key_values=cache, **beams), exact
    )


@pytest.mark.parametrize("dropped", ["model.layers.1.self_attn.key_cache", "model.layers.1.self_attn.value_cache"])
def test_every_half_of_every_layer_needs_a_format(dropped: str, model: LlamaForCausalLM) -> None:
    formats = formats_of(model, "int8_channel")
    del formats[dropped]
    with pytest.raises(ValueError, match="every layer must have a format: got none for layer 1 of LlamaForCausalLM"):
        QuantizedCache(model, formats)
