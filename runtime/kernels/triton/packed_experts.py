"""The experts of a mixture as the checkpoint stores them, by the Triton kernels: two launches for all of them."""

import torch
from torch import Tensor, nn

from runtime.kernels.triton.grouped_experts import FragmentExperts, gather_experts, run_experts
from runtime.kernels.triton.kept_layout import PRODUCT_DTYPES, Identity, Packed, identify_tensors
from runtime.kernels.triton.packed_fragments import fits_kernels, make_fragments

_KEPT = "_fragment_experts"


def packed_experts(
    x: Tensor, expert_index: Tensor, routing_weights: Tensor, gate_up: nn.Module, down: nn.Module
) -> Tensor | None:
    """Returns the weighted sum of the experts of each token, or None where the kernels cannot compute it.

    The experts are gated by silu, without biases; y = sum of weight * down(silu(gate(x)) * up(x)).

    Args:
        x: [tokens, hidden].
        expert_index: [tokens, k] int64, the experts of each token; numbers that are no expert's are skipped.
        routing_weights: [tokens, k].
        gate_up: Packed weights as children, one an expert, the gate's rows above those of the up projection.
        down: As many packed weights.
    """
    wants_gradient = x.requires_grad and torch.is_grad_enabled()
    if wants_gradient or x.dtype not in PRODUCT_DTYPES or torch.compiler.is_compiling():
        return None
    first, last = _find_experts(gate_up), _find_experts(down)
    if first is None or last is None:
        return None
    return run_experts(x, expert_index, routing_weights, first, last)


def _find_experts(projection: nn.Module) -> FragmentExperts | None:
    """Returns the experts of a projection in the kernels' layout, made once for the tensors they hold now."""
    weights: list[Packed] = list(projection.children())  # type: ignore[arg-type]
    if not all(fits_kernels(weight.format) for weight in weights):
        return None
    identity = tuple(identify_tensors(weight) for weight in weights)
    kept: tuple[tuple[Identity, ...], FragmentExperts | None] | None = projection.__dict__.get(_KEPT)
    if kept is None or kept[0] != identity:
        fragments = [make_fragments(weight) for weight in weights]
        # One launch has one kind of arithmetic: integers.
        made = [weight for weight in fragments if weight is not None and weight.element < 0 and weight.factor == 1]
        kept = identity, gather_experts(made) if len(made) == len(fragments) else None
        projection.__dict__[_KEPT] = kept
    return kept[1]
