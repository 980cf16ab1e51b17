"""Decoders that transforms must keep the function of, and how far rounding may move their logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.mixtures import build_tiny_deepseek_v2, build_tiny_deepseek_v3, build_tiny_olmoe, build_tiny_qwen3_moe
from tests.sensitivity.float64_models import make_float64
from tests.tiny_models import VOCABULARY_SIZE, build_model, build_tiny_llama, build_tiny_mixtral, build_tiny_qwen_moe

TOKENS = torch.arange(40).remainder(VOCABULARY_SIZE).view(2, 20)

# A rewritten weight is a sum of at most 64 rounded products (a basis), and every sum of the forward pass has at most
# 128 terms. Two blocks of some ten products each, logits below 8: 2 * 10 * (64 + 128) * eps * 8, which is 7e-12 in
# float64 and 4e-3 in float32. One forgotten scale or basis moves the logits by 0.5 and more.
_ROUNDINGS = 2 * 10 * (64 + 128) * 8
FLOAT64_TOLERANCE = _ROUNDINGS * torch.finfo(torch.float64).eps
FLOAT32_TOLERANCE = _ROUNDINGS * torch.finfo(torch.float32).eps


def build_tiny_qwen2(*, tied: bool = False) -> Qwen2ForCausalLM:
    """Returns a dense decoder with biases of queries, keys and values, three heads of 20 channels and one for values.

    Its widths, 60 and 100, are no powers of two.
    """
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=60,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        initializer_range=0.1,
        tie_word_embeddings=tied,
    )
    return build_model(Qwen2ForCausalLM, config, seed=0)


DECODERS: dict[str, Callable[[], Any]] = {
    "llama": build_tiny_llama,
    "llama, tied": lambda: build_tiny_llama(tied=True),
    "llama, biases and one value head": lambda: build_tiny_llama(attention_bias=True, key_value_heads=1),
    "llama, no shared heads": lambda: build_tiny_llama(key_value_heads=4),
    "qwen2, odd widths": build_tiny_qwen2,
    "qwen2, odd widths, tied": lambda: build_tiny_qwen2(tied=True),
    "mixtral": build_tiny_mixtral,
    "qwen2 mixture": build_tiny_qwen_moe,
    "qwen3 mixture": build_tiny_qwen3_moe,
    "olmoe": build_tiny_olmoe,
}
REFUSED: dict[str, Callable[[], Any]] = {
    "deepseek_v2": build_tiny_deepseek_v2,
    "deepseek_v3": build_tiny_deepseek_v3,
}


def build_float64(name: str) -> Any:
    """Returns a decoder wholly in float64; experts one by one, as the batched kernels know float32 only."""
    model = make_float64(DECODERS[name]())
    model.config._experts_implementation = "eager"
    return model


def compute_logits(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    """Returns the logits [S, T, V]."""
    with torch.no_grad():
        logits: Tensor = model(tokens, use_cache=False).logits
    return logits
