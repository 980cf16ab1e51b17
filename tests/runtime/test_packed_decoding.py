"""The compiled decoder over a packed cache against the model's own forward over the same cache."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from runtime import decoder_run
from runtime.apply import apply_formats_
from runtime.cache_units import find_cache_units
from runtime.compiled_decoder import begin_packed_sequence, install_compiled_decoder_
from runtime.decoder_run import run_tokens
from runtime.greedy_generation import continue_greedily
from runtime.kernels.cpu import load_kernels
from runtime.kernels.dispatch import REFERENCE, kernel_path
from runtime.packed_decoding import find_cache_obstacle
from runtime.quantized_cache import QuantizedCache
from runtime.read_widths import read_at_width
from runtime.units import list_weights
from tests.nan_outputs import nan_filled_outputs
from tests.runtime.kernels.stored_weights import available_kernels
from tests.tiny_models import build_tiny_llama

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler is here")
LEVELS = [kernels.level for kernels in available_kernels()]
# Token by token, in all widths, with and without zero points, and in blocks; as they are.
MIXES = (
    ("int4_g32", "int3_g16_sym", "int2_g32", "int8_channel"),
    ("int5_channel_sym", "int6_g16", "int7_g32_sym", "bf16"),
    ("int4_t32", "int2_t32", "fp16", "int3_channel"),
)


@pytest.fixture(autouse=True)
def outputs_full_of_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with nan_filled_outputs(monkeypatch):
        yield


def build(weights: str = "int8_g32", **sizes: Any) -> Any:
    model = build_tiny_llama(**{"head_dim": 32, **sizes}).requires_grad_(False)
    apply_formats_(model, dict.fromkeys(list_weights(model), weights))
    assert install_compiled_decoder_(model) is None
    return model


def make_cache(model: Any, mix: tuple[str, ...]) -> QuantizedCache:
    units = find_cache_units(model)
    return QuantizedCache(model, {unit.name: mix[i % len(mix)] for i, unit in enumerate(units)})


def draw_tokens(count: int) -> Tensor:
    return torch.randint(2, 320, (1, count), generator=torch.Generator().manual_seed(0))


def step_both(model: Any, cache: QuantizedCache, tokens: Tensor, level: str) -> tuple[Tensor, Tensor, QuantizedCache]:
    """Returns the logits of a step by the model's own forward and by the compiled pass, and the latter's cache."""
    other = copy.deepcopy(cache)
    with kernel_path(REFERENCE):
        expected = model(tokens, past_key_values=cache).logits[0]
    with kernel_path(level):
        sequence = begin_packed_sequence(model, other)
        assert sequence is not None
        found = run_tokens(model, sequence, tokens, wanted=tokens.shape[1])
    return expected, found, other


def assert_close(found: Tensor, expected: Tensor) -> None:
    # Activations of 16 bits in two layers of products.
    assert (found.double() - expected.double()).norm() <= 1e-3 * expected.double().norm()


@torch.no_grad()
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_every_step_is_that_of_the_models_own_forward(mix: tuple[str, ...], level: str) -> None:
    """Each from the same cache: a state that is rounded the other way would part the two for good."""
    model = build()
    cache = make_cache(model, mix)
    tokens = draw_tokens(80)
    for part in tokens.split([1, 30, 1, 1, 33, 1, 13], dim=1):
        expected, found, other = step_both(model, cache, part, level)
        assert_close(found, expected)
        assert other.get_seq_length() == cache.get_seq_length()
        assert other.stored_bytes == cache.stored_bytes
        for mine, its in zip(other.layers, cache.layers, strict=True):
            for half, reference in zip(mine.past, its.past, strict=True):
                a, b = half.read(torch.float32), reference.read(torch.float32)
                # Few states lie where float32 rounds them to another code.
                assert ((a - b).abs() > 1e-3 * b.abs().max()).float().mean() <= 0.05


@torch.no_grad()
def test_tokens_of_a_long_step_see_each_other_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(key_value_heads=1)
    cache = make_cache(model, ("int2_channel", "int2_t32"))
    for part in draw_tokens(75).split([40, 35], dim=1):
        expected, whole, _ = step_both(model, copy.deepcopy(cache), part, LEVELS[-1])
        monkeypatch.setattr(decoder_run, "_PROMPT_TOKENS", 8)
        _, found, cache = step_both(model, cache, part, LEVELS[-1])
        monkeypatch.undo()
        assert_close(found, expected)
        # The same sums in the same order, but for products of many tokens.
        assert_close(found, whole)


@torch.no_grad()
def test_the_forward_takes_it_and_hands_the_same_cache_back() -> None:
    model = build()
    cache, tokens = make_cache(model, MIXES[0]), draw_tokens(6)
    output = model(tokens, past_key_values=cache)
    assert output.past_key_values is cache
    assert cache.sequence is not None
    assert cache.get_seq_length() == 6
    cache.crop(-2)
    again = model(tokens[:, 4:], past_key_values=cache).logits
    # What was cropped is computed anew from the same past, part of it packed now.
    assert again.shape == (1, 2, 320)
    assert cache.get_seq_length() == 6


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False])
def test_a_copy_of_a_cache_goes_on_when_the_cache_is_gone(packed: bool) -> None:
    model, tokens = build(), draw_tokens(41)
    cache = model(tokens[:, :40], past_key_values=make_cache(model, MIXES[2]) if packed else DynamicCache())
    cache = cache.past_key_values
    decoder = (cache.sequence if packed else cache).decoder
    other = copy.deepcopy(cache)
    # It reads tensors by their addresses: a copy would read those of the other.
    assert (other.sequence if packed else other).decoder is decoder
    expected = model(tokens[:, 40:], past_key_values=cache).logits
    del cache, decoder
    assert torch.equal(model(tokens[:, 40:], past_key_values=other).logits, expected)


@torch.no_grad()
def test_a_copy_of_a_cache_notes_that_weights_are_read_at_another_width() -> None:
    model, tokens = build(weights="nested4_8_g32"), draw_tokens(9)
    cache = make_cache(model, MIXES[0])
    model(tokens[:, :8], past_key_values=cache)
    other = copy.deepcopy(cache)
    with read_at_width(model, 4):
        found = model(tokens[:, 8:], past_key_values=other).logits[0]
        with kernel_path(REFERENCE):
            expected = model(tokens[:, 8:], past_key_values=copy.deepcopy(cache)).logits[0]
    assert_close(found, expected)


@torch.no_grad()
def test_other_formats_run_module_by_module() -> None:
    model = build()
    cache = make_cache(model, ("mxfp8_e4m3", "int4_g32"))
    assert begin_packed_sequence(model, cache) is None
    assert "for the compiled decoder: got 'mxfp8_e4m3'." in str(find_cache_obstacle(cache))
    assert find_cache_obstacle(make_cache(model, MIXES[2])) is None
    model(draw_tokens(4), past_key_values=cache)
    assert cache.sequence is None
    two = make_cache(model, MIXES[0])
    model(draw_tokens(4).repeat(2, 1), past_key_values=two)
    assert two.sequence is None


def test_text_is_that_of_generate() -> None:
    model = build()
    tokens, settings = draw_tokens(12), {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 1}
    expected = model.generate(tokens, past_key_values=make_cache(model, MIXES[2]), **settings)
    found = continue_greedily(model, tokens, max_new_tokens=30, past=make_cache(model, MIXES[2]))
    assert found is not None
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_past(threads: int) -> None:
    model = build()
    before = torch.get_num_threads()
    cache, tokens = make_cache(model, MIXES[2]), draw_tokens(41)
    model(tokens[:, :40], past_key_values=cache)
    alone = model(tokens[:, 40:], past_key_values=copy.deepcopy(cache)).logits
    try:
        torch.set_num_threads(threads)
        assert torch.equal(model(tokens[:, 40:], past_key_values=cache).logits, alone)
    finally:
        torch.set_num_threads(before)
