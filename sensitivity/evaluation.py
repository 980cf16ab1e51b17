"""Evaluate assignments: KL divergence to the reference and perplexity on held-out text, with intervals.

All assignments are measured on the same text beside the same reference, a few sequences at a time: the reference's
logits are computed once for each group of sequences, then every assignment's, so memory does not grow with the
text. Intervals are Student's t over the sequences' means (positions of one sequence are not independent); two
assignments are compared by the interval of their paired difference.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.activation_names import is_activation, module_of
from runtime.apply import KeptRenderings, simulated_formats
from runtime.cached_attention import simulated_cache, split_cache_formats
from runtime.rendering import RenderingRule
from runtime.simulated_activations import ActivationScheme, simulated_activations

_GROUP_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class SequenceScores:
    """What one assignment scored on each sequence.

    Args:
        kl: [S] mean KL divergence to the reference over the sequence's positions, nats per token.
        nll: [S] mean negative log-likelihood of the sequence's next tokens, nats per token.
    """

    kl: NDArray[np.float64]
    nll: NDArray[np.float64]


@torch.no_grad()
def score_assignments(
    model: Any,
    assignments: Mapping[str, Mapping[str, str]],
    tokens: Tensor,
    *,
    quantizer: RenderingRule = "rtn",
    activation_scales: Mapping[str, Mapping[str, NDArray[np.float32]]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, SequenceScores]:
    """Returns the scores of every assignment by name.

    Args:
        model: The reference model.
        assignments: Name -> name of a weight, a cache or a linear layer's input -> format name; an empty mapping is the
            reference itself. With a quantized cache every token sees the others before it as in decoding.
        tokens: [S, T] int64 held-out text.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        activation_scales: Linear layer -> static format of its input -> scale, for those that are named.
        progress: Called with (passes done, passes in all).
    """
    group = max(1, _GROUP_TOKENS // tokens.shape[1])
    kept: KeptRenderings = {}
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in assignments}
    total = len(assignments) * -(-tokens.shape[0] // group)
    for start in range(0, tokens.shape[0], group):
        batch = tokens[start : start + group]
        reference = _log_probabilities(model, batch)
        for name, formats in assignments.items():
            rest, caches = split_cache_formats(formats)
            weights = {name: format_ for name, format_ in rest.items() if not is_activation(name)}
            with (
                simulated_formats(model, weights, quantizer=quantizer, kept=kept),
                simulated_cache(model, caches),
                simulated_activations(model, make_scheme(rest, activation_scales or {})),
            ):
                log_q = _log_probabilities(model, batch) if formats else reference
            parts[name].append((_kl(reference, log_q), _nll(log_q, batch)))
            progress(sum(map(len, parts.values())), total)
    return {
        name: SequenceScores(
            kl=torch.cat([kl for kl, _ in pairs]).numpy(), nll=torch.cat([nll for _, nll in pairs]).numpy()
        )
        for name, pairs in parts.items()
    }


def make_scheme(
    formats: Mapping[str, str], scales: Mapping[str, Mapping[str, NDArray[np.float32]]]
) -> ActivationScheme:
    """Returns the formats of inputs among the formats of a plan's parts, with their static scales.

    Args:
        formats: Name of a weight, a cache or a linear layer's input -> format name.
        scales: Linear layer -> static format -> scale.
    """
    scheme: dict[str, tuple[str, list[float] | None]] = {}
    for name, format_ in formats.items():
        if is_activation(name):
            scale = scales.get(module_of(name), {}).get(format_)
            scheme[module_of(name)] = (format_, None if scale is None else scale.tolist())
    return scheme


def mean_interval(values: NDArray[np.float64], level: float = 0.95) -> tuple[float, float, float]:
    """Returns (mean, low, high) of Student's t interval of the mean of independent values [S], S >= 2."""
    from scipy.stats import t

    mean = float(values.mean())
    half = float(t.ppf(0.5 + level / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def _log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    return torch.log_softmax(model(tokens, use_cache=False).logits.float(), dim=-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    # One sequence at a time: the products are as large as the logits.
    return torch.stack([(p.exp() * (p - q)).sum(-1).double().mean() for p, q in zip(log_p, log_q, strict=True)])


def _nll(log_q: Tensor, tokens: Tensor) -> Tensor:
    return -log_q[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].double().mean(dim=-1)
