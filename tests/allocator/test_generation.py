"""Generation: greedy is the argmax of every step, sampling goes by its seed."""

import pytest
import torch

from allocator.generation import generate_text
from tests.tiny_models import build_tiny_llama, build_tokenizer


def test_greedy_takes_the_most_likely_token() -> None:
    model, tokenizer = build_tiny_llama(), build_tokenizer()
    tokens = tokenizer("The cache", return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(5):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert generate_text(model, tokenizer, "The cache", max_new_tokens=5) == expected


def test_sampling_goes_by_its_seed() -> None:
    model, tokenizer = build_tiny_llama(), build_tokenizer()
    texts = [
        generate_text(model, tokenizer, "The cache", max_new_tokens=12, temperature=1.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("The cache") for text in texts)


def test_prompt_without_a_token() -> None:
    with pytest.raises(ValueError, match=r"a prompt must have at least one token: got ''"):
        generate_text(build_tiny_llama(), build_tokenizer(), "", max_new_tokens=3)
