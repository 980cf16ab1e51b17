"""Tiny models of every kind that can be packed, and random formats for all of their weights."""

import random
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, MixtralForCausalLM, PreTrainedModel

from runtime.formats import FORMATS
from runtime.units import list_weights
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral, build_tiny_qwen_moe

TOKENS = torch.arange(24).mul(7).remainder(VOCABULARY_SIZE).view(2, 12)


def build_tiny_gemma() -> Gemma2ForCausalLM:
    """Returns a decoder that multiplies the rows of its tied embedding by the root of their length."""
    config = Gemma2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Gemma2ForCausalLM(config).eval()


def build_three_expert_mixtral() -> MixtralForCausalLM:
    """Returns a mixture that sums three experts a token: with two, no order of summing differs from another."""
    model = build_tiny_mixtral()
    model.config.num_experts_per_tok = 3
    mixture = MixtralForCausalLM(model.config).eval()
    mixture.load_state_dict(model.state_dict())
    return mixture


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": build_tiny_llama,
    "llama_tied": partial(build_tiny_llama, tied=True),
    "llama_biases": partial(build_tiny_llama, attention_bias=True),
    "gemma": build_tiny_gemma,
    "mixtral": build_three_expert_mixtral,
    "qwen_moe": build_tiny_qwen_moe,
}


def draw_formats(model: nn.Module, seed: int) -> dict[str, str]:
    """Returns a format for every weight of a model: first a family, then one of its formats that the shape allows."""
    generator = random.Random(seed)
    drawn = {}
    for name, weight in list_weights(model).items():
        fitting = [f for f in FORMATS.values() if f.fits(weight.shape[1])]
        kind = generator.choice(sorted({f.kind for f in fitting}))
        drawn[name] = generator.choice([f.name for f in fitting if f.kind == kind])
    return drawn


def round_parameters_(model: nn.Module, dtype: torch.dtype) -> None:
    """Rounds all parameters to values that a narrower type holds, and leaves them as wide as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def compute_logits(model: nn.Module) -> Tensor:
    """Returns the logits [2, 12, vocabulary] of ``TOKENS``."""
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits
