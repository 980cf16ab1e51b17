"""Untying and the matrix behind the last norm."""

import pytest
import torch

from runtime.candidates import list_candidates
from runtime.transforms.tied_head import MappedNorm, has_map, install_map_, untie_head_
from runtime.units import find_units
from tests.mixtures import build_tiny_deepseek_v2
from tests.runtime.transforms.decoders import compute_logits
from tests.tiny_models import build_tiny_llama


def test_untied_heads_are_equal_and_their_own() -> None:
    model = build_tiny_llama(tied=True)
    logits = compute_logits(model)
    untie_head_(model)
    assert torch.equal(compute_logits(model), logits)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    # Nothing ties them again.
    model.tie_weights()
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_heads_of_their_own_stay() -> None:
    model = build_tiny_llama()
    head = model.lm_head.weight
    untie_head_(model)
    assert model.lm_head.weight is head


def test_unknown_decoders_are_refused() -> None:
    with pytest.raises(ValueError, match="must hold the linear layers"):
        untie_head_(build_tiny_deepseek_v2())


def test_map_is_a_linear_layer_behind_the_norm() -> None:
    model = build_tiny_llama(tied=True)
    logits = compute_logits(model)
    assert not has_map(model)
    mapped = install_map_(model)
    assert has_map(model) and model.model.norm is mapped
    mapped.map.weight.copy_(torch.eye(64))
    assert torch.equal(compute_logits(model), logits)
    mapped.map.weight.mul_(2)
    assert torch.equal(compute_logits(model), 2 * logits)


def test_map_is_a_unit_that_takes_the_formats_of_heads() -> None:
    model = build_tiny_llama(tied=True)
    install_map_(model)
    [unit] = [unit for unit in find_units(model) if unit.name == "model.norm.map"]
    assert unit.kind == "head"
    candidates = list_candidates([unit], ["int3_g64", "int4_g64"])
    assert candidates.allowed.tolist() == [[False, True]]


def test_map_can_be_empty() -> None:
    mapped = install_map_(build_tiny_llama(tied=True), device="meta")
    assert isinstance(mapped, MappedNorm) and mapped.map.weight.is_meta and not mapped.norm.weight.is_meta
