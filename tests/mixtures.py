"""Two-layer mixtures of every family of routers, and each router's rule written down once more in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.tiny_models import SIZES, build_tiny_mixtral, build_tiny_qwen_moe

_SIZES = {**SIZES, "tie_word_embeddings": False}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}


def _build(model_class: Callable[..., Any], config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config).eval()


def build_tiny_qwen3_moe() -> PreTrainedModel:
    """Returns a mixture of six experts, two per token, their weights normalised, no shared expert."""
    config = Qwen3MoeConfig(
        **_SIZES, head_dim=16, moe_intermediate_size=64, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True
    )
    return _build(Qwen3MoeForCausalLM, config)


def build_tiny_olmoe() -> PreTrainedModel:
    """Returns a mixture of eight experts, three per token, their weights not normalised."""
    config = OlmoeConfig(**_SIZES, intermediate_size=64, num_experts=8, num_experts_per_tok=3, norm_topk_prob=False)
    return _build(OlmoeForCausalLM, config)


def build_tiny_deepseek_v2() -> PreTrainedModel:
    """Returns a dense layer and two mixtures of six experts in groups of three, one group per token, one shared."""
    config = DeepseekV2Config(
        **{**_SIZES, **_LATENT_ATTENTION},
        intermediate_size=128,
        moe_intermediate_size=64,
        n_routed_experts=6,
        n_shared_experts=1,
        num_experts_per_tok=2,
        routed_scaling_factor=1.5,
        topk_method="group_limited_greedy",
        n_group=2,
        topk_group=1,
    )
    return _build(DeepseekV2ForCausalLM, config)


def build_tiny_deepseek_v3() -> PreTrainedModel:
    """Returns a dense layer and two mixtures of eight experts with sigmoid scores, groups, and a bias of the choice."""
    config = DeepseekV3Config(
        **{**_SIZES, **_LATENT_ATTENTION},
        intermediate_size=128,
        moe_intermediate_size=64,
        n_routed_experts=8,
        n_shared_experts=2,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    model = _build(DeepseekV3ForCausalLM, config)
    for layer in model.model.layers[1:]:
        # Large enough to change the choice, which the weights must not follow.
        layer.mlp.gate.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 8))
    return model


def _softmax_rule(logits: Tensor, gate: Any, *, normalised: bool) -> tuple[Tensor, Tensor]:
    probability = logits.softmax(dim=-1)
    chosen = probability.argsort(dim=-1, descending=True)[:, : gate.top_k]
    weight = probability.gather(1, chosen)
    return chosen, weight / weight.sum(dim=-1, keepdim=True) if normalised else weight


def _deepseek_v2_rule(logits: Tensor, gate: Any) -> tuple[Tensor, Tensor]:
    probability = logits.softmax(dim=-1)
    best = probability.view(-1, 2, 3).amax(dim=-1).argmax(dim=-1)
    outside = torch.arange(6) // 3 != best[:, None]
    chosen = probability.masked_fill(outside, -1.0).argsort(dim=-1, descending=True)[:, :2]
    return chosen, 1.5 * probability.gather(1, chosen)


def _deepseek_v3_rule(logits: Tensor, gate: Any) -> tuple[Tensor, Tensor]:
    score = logits.sigmoid()
    biased = score + gate.e_score_correction_bias.double()
    # Groups are pairs: the sum of their two best is the sum of both.
    groups = biased.view(-1, 4, 2).sum(dim=-1).argsort(dim=-1, descending=True)[:, :2]
    inside = (torch.arange(8)[None, :, None] // 2 == groups[:, None, :]).any(dim=-1)
    chosen = biased.masked_fill(~inside, -9.0).argsort(dim=-1, descending=True)[:, :3]
    weight = score.gather(1, chosen)
    return chosen, 2.5 * weight / weight.sum(dim=-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A family: its model, and its rule from router logits [N, E] to experts and gate weights [N, k]."""

    build: Callable[[], Any]
    rule: Callable[[Tensor, Any], tuple[Tensor, Tensor]]
    reports_logits: bool = True


MIXTURES = {
    "mixtral": Mixture(build=build_tiny_mixtral, rule=lambda z, g: _softmax_rule(z, g, normalised=True)),
    "qwen2": Mixture(build=build_tiny_qwen_moe, rule=lambda z, g: _softmax_rule(z, g, normalised=False)),
    "qwen3": Mixture(build=build_tiny_qwen3_moe, rule=lambda z, g: _softmax_rule(z, g, normalised=True)),
    "olmoe": Mixture(build=build_tiny_olmoe, rule=lambda z, g: _softmax_rule(z, g, normalised=False)),
    "deepseek_v2": Mixture(build=build_tiny_deepseek_v2, rule=_deepseek_v2_rule, reports_logits=False),
    "deepseek_v3": Mixture(build=build_tiny_deepseek_v3, rule=_deepseek_v3_rule, reports_logits=False),
}


@torch.no_grad()
def route_by_rule(model: Any, tokens: Tensor, mixture: Mixture) -> list[tuple[Tensor, Tensor]]:
    """Returns experts and gate weights [N, k] of every mixture layer, from the inputs of its router in float64."""
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    inputs: list[list[Tensor]] = [[] for _ in gates]
    hooks = [
        gate.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].reshape(-1, args[0].shape[-1])))
        for gate, kept in zip(gates, inputs, strict=True)
    ]
    for sequence in tokens:
        model(sequence[None])
    for hook in hooks:
        hook.remove()
    rows = [torch.cat(kept).double() for kept in inputs]
    return [mixture.rule(x @ gate.weight.double().T, gate) for gate, x in zip(gates, rows, strict=True)]
