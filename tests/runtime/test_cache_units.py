"""Cache units: the keys and the values of each layer, and which formats they may take."""

from dataclasses import dataclass

import numpy as np
import pytest
from transformers import MistralConfig, MistralForCausalLM

from runtime.cache_formats import CACHE_FORMATS
from runtime.cache_units import find_cache_units, list_cache_candidates
from runtime.formats import Format
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral


def test_keys_and_values_of_each_layer_are_units() -> None:
    units = find_cache_units(build_tiny_llama(key_value_heads=1, head_dim=24))
    assert [unit.name for unit in units] == [
        f"model.layers.{layer}.self_attn.{half}_cache" for layer in (0, 1) for half in ("key", "value")
    ]
    assert [(u.role, u.kind, u.layer_index) for u in units[2:]] == [
        ("key_cache", "key_cache", 1),
        ("value_cache", "value_cache", 1),
    ]
    assert {unit.cache_shape for unit in units} == {(1, 24)}
    assert {unit.weight_count for unit in units} == {0}
    assert len(find_cache_units(build_tiny_mixtral())) == 4


def test_a_sliding_window_is_refused() -> None:
    config = MistralConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=8,
    )
    with pytest.raises(ValueError, match=r"got 2 attentions .* in 2 layers \(DynamicSlidingWindowLayer\) of Mistral"):
        find_cache_units(MistralForCausalLM(config).eval())


def test_a_group_must_divide_a_head() -> None:
    units = find_cache_units(build_tiny_llama(head_dim=96))
    candidates = list_cache_candidates(units, ["int4_g32", "int4_g64", "int4_channel", "bf16", "int4_t32"])
    assert np.array_equal(candidates.allowed, np.tile([True, False, True, True, True], (4, 1)))
    assert candidates.reasons[2, 1] == "group_size=64 does not divide head_dim=96"


def test_a_cache_without_any_format_is_refused() -> None:
    units = find_cache_units(build_tiny_llama())
    with pytest.raises(
        ValueError, match=r"'model.layers.0.self_attn.key_cache' has none \(group_size=32 does not divide head_dim=16\)"
    ):
        list_cache_candidates(units, ["int4_g32"])


@dataclass(frozen=True, kw_only=True)
class _SharedScaleFormat(Format):
    """A format with one scale for the whole matrix."""

    def storage_bytes(self, shape: tuple[int, int]) -> int:
        return 2 + shape[0] * shape[1]


def test_a_format_that_shares_something_between_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = _SharedScaleFormat(name="shared", kind="int", bits=8)
    monkeypatch.setitem(CACHE_FORMATS, "shared", shared)
    with pytest.raises(ValueError, match="its rows share something, and a cache grows row by row"):
        list_cache_candidates(find_cache_units(build_tiny_llama()), ["shared"])
