"""The independent truth of joint changes: a copy of the model with rendered weights, run whole, its KL in float64."""

import copy
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from runtime.candidates import Candidates
from runtime.rendering import render
from runtime.units import read_weight

EPS = torch.finfo(torch.float32).eps


def build_changed(model: PreTrainedModel, candidates: Candidates, format_by_unit: Mapping[int, int]) -> PreTrainedModel:
    """Returns a copy of the model whose units u have the formats f."""
    changed = copy.deepcopy(model)
    for u, f in format_by_unit.items():
        for weight in candidates.units[u].weights:
            values = read_weight(changed, weight)
            values.copy_(render(read_weight(model, weight), candidates.formats[f]))
    return changed


def compute_kl(model: PreTrainedModel, changed: PreTrainedModel, tokens: Tensor) -> NDArray[np.float64]:
    """Returns the KL of each sequence [S], nats per token."""
    with torch.no_grad():
        log_p = torch.log_softmax(model(tokens).logits.double(), -1)
        log_q = torch.log_softmax(changed(tokens).logits.double(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1).numpy()


def joint_kl(
    model: PreTrainedModel, candidates: Candidates, format_by_unit: Mapping[int, int], tokens: Tensor
) -> NDArray[np.float64]:
    """Returns the KL [S] of a model with several units changed."""
    return compute_kl(model, build_changed(model, candidates, format_by_unit), tokens)


def kl_bound(kl: NDArray[np.float64], largest_log_p: float, vocabulary_size: int) -> NDArray[np.float64]:
    """Returns how far float32 may be off a KL.

    Logarithms of p and q are rounded by an eps of their size four times over, and those of two runs of a model with
    its weights in other places of the memory differ by as much again: d = 8 eps log. The terms e^c - 1 - c have the
    slope c and sum p c^2 is about 2 KL, so the sum errs by d sqrt(2 KL) + d^2 / 2; then the rounding of V terms.
    """
    size = 8 * EPS * largest_log_p
    return np.asarray(size * np.sqrt(2 * kl) + size**2 / 2 + vocabulary_size * EPS * kl)
