"""Gradients of the sampled score by plain autograd, and their inner products with candidates' errors in float64."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from runtime.candidates import Candidates
from runtime.rendering import render
from runtime.units import Weight, read_weight


def draw_labels(logits: Tensor, index: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)[:, 0]


def compute_gradients(
    model: PreTrainedModel, tokens: Tensor, index: int, loss: Callable[[Tensor, int], Tensor]
) -> dict[str, Tensor]:
    """Returns the gradient of a sequence's loss, of every parameter."""
    model = copy.deepcopy(model).requires_grad_(True)
    value = loss(model(tokens[index : index + 1], use_cache=False).logits[0], index)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True)
    }


def make_score(seed: int) -> Callable[[Tensor, int], Tensor]:
    """Returns minus the log-likelihood of the sampled labels, as a loss."""

    def score(logits: Tensor, index: int) -> Tensor:
        labels = draw_labels(logits.detach(), index, seed)
        return -torch.log_softmax(logits, dim=-1)[torch.arange(len(labels)), labels].sum()

    return score


def contract(
    model: PreTrainedModel,
    candidates: Candidates,
    gradients: dict[str, Tensor],
    base: Callable[[Weight], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns <gradient, error> [U, F] in float64, and the bound on what float32 makes of it."""
    product = torch.zeros(candidates.allowed.shape, dtype=torch.float64)
    bound = torch.zeros_like(product)
    for u, f in np.argwhere(candidates.allowed):
        for weight in candidates.units[u].weights:
            values = read_weight(model, weight)
            gradient = gradients[weight.parameter]
            if weight.expert_index is not None:
                gradient = gradient[weight.expert_index]
            rendered = render(values if base is None else base(weight), candidates.formats[f])
            terms = (rendered - values).double() * gradient.double()
            product[u, f] += terms.sum()
            # Rounding errors of a sum of n terms add up like a random walk, sqrt(n) eps of the sum of magnitudes;
            # the gradients themselves come from another order of the same sums. Four deviations.
            bound[u, f] += 4 * terms.numel() ** 0.5 * torch.finfo(torch.float32).eps * terms.abs().sum()
    return product, bound
