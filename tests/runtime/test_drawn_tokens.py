"""Drawn tokens are of the vocabulary, the same for a seed, and evenly spread."""

import pytest
import torch

from runtime.drawn_tokens import draw_tokens
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama


def test_tokens_are_evenly_drawn_from_the_vocabulary() -> None:
    tokens = draw_tokens(build_tiny_llama(), sequences=50, sequence_tokens=640)
    assert tokens.shape == (50, 640)
    assert tokens.dtype == torch.int64
    counts = torch.bincount(tokens.flatten(), minlength=VOCABULARY_SIZE)
    assert len(counts) == VOCABULARY_SIZE
    # Each count is binomial, mean 100, standard deviation 10: six of them hold for all 320 but once in a million seeds.
    assert bool(((counts - 100).abs() <= 60).all())


def test_seed_and_vocabulary_decide() -> None:
    model = build_tiny_llama(seed=0)
    tokens = draw_tokens(model, seed=3)
    assert torch.equal(tokens, draw_tokens(build_tiny_llama(seed=1), seed=3))
    assert not torch.equal(tokens, draw_tokens(model, seed=4))


def test_number_of_sequences_is_checked() -> None:
    with pytest.raises(ValueError, match="sequences must be at least 1: got sequences=0"):
        draw_tokens(build_tiny_llama(), sequences=0)
