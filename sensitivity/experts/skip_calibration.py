"""Finds how small an expert's weight must be to be skipped: quantiles over calibration text, layer by layer.

    ratio[l]     = quantile over tokens of (second largest weight / largest weight),
    magnitude[l] = quantile at 1 - protected share of |x|_1.

With two experts a token and the median, half of the tokens skip their second one. What the numbers do is in
``runtime/expert_skipping.py``.

Paper: Huang et al. 2025 (MC-MoE, arXiv:2410.06270): the median, and 2 % of the tokens protected.
"""

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.expert_skipping import ExpertSkipping
from sensitivity.experts.expert_calls import ExpertCall, watched_experts

PROTECTED_SHARE = 0.02


@torch.no_grad()
def calibrate_skipping(
    model: Any,
    tokens: Tensor,
    *,
    quantile: float = 0.5,
    protected_share: float = PROTECTED_SHARE,
    weights_fingerprint: str = "",
) -> ExpertSkipping:
    """Returns below which ratio a mixture skips experts, and which tokens it does not do so for.

    Args:
        model: A mixture of experts, at least two a token.
        tokens: [S, T] int64 of calibration text.
        quantile: Of the second weight over the first, 0 to 1: about so many tokens skip their second expert.
        protected_share: Share of the tokens, 0 to 1, that keep all experts: those of the largest norms.
        weights_fingerprint: The model's.

    Raises:
        ValueError: If a share is not from 0 to 1, or the model is no mixture with at least two experts a token.
    """
    for name, share in (("quantile", quantile), ("protected_share", protected_share)):
        if not 0.0 <= share <= 1.0:
            msg = f"{name} must be from 0 to 1: got {name}={share}. The paper has 0.5, and 0.02 protected."
            raise ValueError(msg)
    ratios, magnitudes = defaultdict(list), defaultdict(list)

    def visit(call: ExpertCall) -> None:
        if call.gate_weight.shape[-1] < 2:
            msg = (
                "experts can be skipped where a token takes at least two: got "
                f"{call.gate_weight.shape[-1]} in layer {call.layer_index}. Leave the skipping out."
            )
            raise ValueError(msg)
        largest = call.gate_weight.double().topk(2, dim=-1).values
        ratios[call.layer_index].append((largest[:, 1] / largest[:, 0]).numpy())
        magnitudes[call.layer_index].append(call.hidden.abs().sum(-1).double().numpy())

    with watched_experts(model, visit):
        for sequence in tokens:
            model(sequence[None], use_cache=False)
    layers = tuple(sorted(ratios))
    return ExpertSkipping(
        layers=layers,
        ratio=tuple(_quantile(ratios[layer], quantile) for layer in layers),
        magnitude=tuple(
            _quantile(magnitudes[layer], 1.0 - protected_share) if protected_share else None for layer in layers
        ),
        weights_fingerprint=weights_fingerprint,
    )


def _quantile(parts: list[NDArray[np.float64]], share: float) -> float:
    return float(np.quantile(np.concatenate(parts), share))
