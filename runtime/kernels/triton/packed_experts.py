"""The experts of a mixture as the checkpoint stores them, by the Triton kernels: two launches for all of them.

Experts in a format of one factor (``FRAGMENT_KINDS``) share the launches, whatever formats these are. Others, such as
sums of binary planes or mixtures of widths, are multiplied one by one, as a dense layer of their format is.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from runtime.kernels.reference import linear_reference
from runtime.kernels.triton.fragment_layout import FragmentWeight
from runtime.kernels.triton.grouped_experts import FragmentExperts, Multiply, gather_experts, run_experts
from runtime.kernels.triton.kept_layout import PRODUCT_DTYPES, Identity, Packed, identify_tensors
from runtime.kernels.triton.packed_fragments import fits_kernels, make_fragments
from runtime.kernels.triton.packed_product import packed_linear

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
    return run_experts(x, expert_index, routing_weights, first, last)


def _find_experts(projection: nn.Module) -> FragmentExperts:
    """Returns the experts of a projection in the kernels' layout, made once for the tensors they hold now."""
    weights: list[Packed] = list(projection.children())  # type: ignore[arg-type]
    identity = tuple(identify_tensors(weight) for weight in weights)
    kept: tuple[tuple[Identity, ...], FragmentExperts] | None = projection.__dict__.get(_KEPT)
    if kept is None or kept[0] != identity:
        kept = identity, gather_experts([_find_expert(weight) for weight in weights], weights[0].shape)
        projection.__dict__[_KEPT] = kept
    return kept[1]


def _find_expert(weight: Packed) -> FragmentWeight | Multiply:
    """Returns a weight in the kernels' layout; where it has none, its product by itself."""
    fragments = make_fragments(weight) if fits_kernels(weight.format) else None
    return partial(_multiply_alone, weight) if fragments is None else fragments


def _multiply_alone(weight: Any, x: Tensor) -> Tensor:
    product = packed_linear(x, weight, None)
    return linear_reference(x, weight(), None) if product is None else product
