"""The forward of packed experts: all experts that a step visits in two calls, whatever their widths.

Tokens are sorted by expert; one call multiplies every group of tokens with its expert's first projection, another with
its last. Only the experts that have a token are read, and threads share the bytes of all of them. Registered with
transformers under the name ``EXPERTS_IMPLEMENTATION``, so that a model's own code calls it. Where there is no kernel,
or a gradient is wanted, the model's own loop over experts runs, as it does for dense experts.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from runtime.kernels import dispatch
from runtime.packed import PackedExperts

EXPERTS_IMPLEMENTATION = "bitplan"


def packed_experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Returns the weighted sum of the experts of each token, [tokens, hidden].

    Args:
        module: Experts of transformers, decorated with ``use_experts_implementation``.
        hidden_states: [tokens, hidden].
        top_k_index: [tokens, k] expert of each slot; numbers that are no expert's are skipped.
        top_k_weights: [tokens, k].
    """
    first = getattr(module, "gate_up_proj" if module.has_gate else "up_proj")
    last = module.down_proj
    if dispatch.uses_triton(hidden_states.device) and _is_gated_by_silu(module, first, last):
        # Imported where it is needed: on other machines there may be no Triton.
        from runtime.kernels.triton.packed_experts import packed_experts

        launched = packed_experts(hidden_states, top_k_index, top_k_weights, first, last)
        if launched is not None:
            return launched
    if not _has_kernels(module, first, last, hidden_states):
        eager: Tensor = type(module).forward.__wrapped__(module, hidden_states, top_k_index, top_k_weights)
        return eager
    experts, slot_order = torch.sort(top_k_index.reshape(-1), stable=True)
    slot_order = slot_order[: int(torch.searchsorted(experts, module.num_experts))]
    used, counts = torch.unique_consecutive(experts[: len(slot_order)], return_counts=True)
    numbers, lengths = used.tolist(), counts.tolist()
    tokens = slot_order // top_k_index.shape[1]
    states = _multiply(hidden_states[tokens], first, numbers, lengths)
    states = module._apply_gate(states) if module.has_gate else module.act_fn(states)
    states = _multiply(states, last, numbers, lengths)
    if module.has_post_expert_norm:
        states = module.post_expert_norm(states)
    weighted = states * top_k_weights.reshape(-1)[slot_order].unsqueeze(-1)
    return torch.zeros_like(hidden_states).index_add_(0, tokens, weighted.to(hidden_states.dtype))


def _multiply(states: Tensor, projection: PackedExperts, numbers: list[int], lengths: list[int]) -> Tensor:
    weights = [projection.expert(number) for number in numbers]
    if not weights:
        return states.new_zeros((0, projection.expert(0).shape[0]))
    return torch.cat(dispatch.linear_many(torch.split(states, lengths), weights))


def _has_kernels(module: Any, first: nn.Module | Tensor, last: nn.Module | Tensor, hidden_states: Tensor) -> bool:
    packed = isinstance(first, PackedExperts) and isinstance(last, PackedExperts)
    wants_gradient = torch.is_grad_enabled() and hidden_states.requires_grad
    plain = not (module.has_bias or module.is_transposed or wants_gradient)
    return packed and plain and hidden_states.device.type == "cpu" and dispatch.selected_kernels() is not None


def _is_gated_by_silu(module: Any, first: nn.Module | Tensor, last: nn.Module | Tensor) -> bool:
    packed = isinstance(first, PackedExperts) and isinstance(last, PackedExperts)
    plain = not (module.has_bias or module.is_transposed or module.has_post_expert_norm)
    # transformers' silu is torch's module, or a class of its own by that name.
    return packed and plain and module.has_gate and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation")


# Where the model's code looks the name up; there is no other way to give transformers a forward.
ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, packed_experts_forward)
