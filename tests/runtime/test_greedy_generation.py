"""The loop of greedy generation gives what transformers' own gives."""

from typing import Any

import pytest
import torch

from runtime.apply import apply_formats_
from runtime.compiled_decoder import install_compiled_decoder_
from runtime.greedy_generation import continue_greedily
from runtime.kernels.cpu import load_kernels
from runtime.kernels.dispatch import kernel_path
from runtime.units import list_weights
from tests.tiny_models import build_tiny_llama

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler is here")
TOKENS = torch.tensor([[7, 90, 31, 200, 5]])


def make_packed() -> Any:
    model = build_tiny_llama()
    apply_formats_(model, dict.fromkeys(list_weights(model), "int5_g32"))
    assert install_compiled_decoder_(model.requires_grad_(False)) is None
    return model


def test_tokens_are_those_of_generate() -> None:
    model = make_packed()
    expected = model.generate(TOKENS, max_new_tokens=12, do_sample=False, pad_token_id=1)
    assert torch.equal(continue_greedily(model, TOKENS, max_new_tokens=12), expected)
    # It ends behind a token that ends texts, which is part of the result.
    model.generation_config.eos_token_id = [int(expected[0, 8]), 1]
    found = continue_greedily(model, TOKENS, max_new_tokens=12)
    assert found is not None
    assert torch.equal(found, model.generate(TOKENS, max_new_tokens=12, do_sample=False, pad_token_id=1))
    assert found.shape[1] <= 9


def test_what_it_does_not_do_is_left_to_generate() -> None:
    model = make_packed()
    with kernel_path("reference"):
        assert continue_greedily(model, TOKENS, max_new_tokens=2) is None
    model.generation_config.repetition_penalty = 1.3
    assert continue_greedily(model, TOKENS, max_new_tokens=2) is None
    assert continue_greedily(build_tiny_llama(), TOKENS, max_new_tokens=2) is None
