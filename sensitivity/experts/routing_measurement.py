"""Measures routing: the statistics of one model, and how far a quantized model's routing is from the reference's.

The router shift compares the sets of experts that the same tokens take in the reference model and in the model with
formats, layer by layer:

    changed[l] = share of tokens whose set is another one,
    overlap[l] = mean over tokens of |both sets| / k.

A changed hidden state changes the choice even where the router itself is exact, and the change adds up with depth.
KL divergences need no correction for it: they compare the logits of the quantized model, which is routed by its own
hidden states, with those of the reference. What does leave the shift out is every statistic taken from the reference
alone: second moments, output errors, the Fisher sketch, and frequencies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.apply import simulated_formats
from runtime.expert_modules import find_expert_modules, layer_index_of
from runtime.rendering import RenderingRule
from runtime.residency import Residency
from sensitivity.experts.expert_calls import ExpertCall, watched_experts
from sensitivity.experts.routing import RoutingStatistics
from sensitivity.streaming.layerwise_model import LayerwiseModel

ALL_TEXT = "all"


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterShift:
    """How far a quantized model's choice of experts is from the reference's, on the same tokens.

    Args:
        layers: Indices of the layers with experts, L of them.
        changed: [L], share of tokens whose set of experts is another one.
        overlap: [L], mean share of a token's experts that both models take.
        tokens: Number of tokens compared.
    """

    layers: tuple[int, ...]
    changed: NDArray[np.float64]
    overlap: NDArray[np.float64]
    tokens: int


class RoutingCounter:
    """Adds up calls of the experts, one domain after another.

    Args:
        model: A mixture of experts.
        domains: Names of the domains.

    Raises:
        ValueError: If the model has no experts, or layers with different numbers of them.
    """

    def __init__(self, model: Any, domains: Sequence[str]) -> None:
        modules = find_expert_modules(model)
        counts = sorted({int(module.num_experts) for module in modules.values()})
        if len(counts) > 1:
            msg = f"all layers must have the same number of experts: got {counts} in {type(model).__name__}."
            raise ValueError(msg)
        self._row = {name: row for row, name in enumerate(modules)}
        shape = (len(domains), len(modules), counts[0])
        self._domains = tuple(domains)
        self._visits = np.zeros(shape, dtype=np.int64)
        self._gate_weight = np.zeros(shape)
        self._together = np.zeros((*shape[1:], counts[0]), dtype=np.int64)
        self._tokens = np.zeros(len(domains), dtype=np.int64)
        self.domain = 0

    def add_tokens(self, count: int) -> None:
        """Counts the tokens that a run of the model is given."""
        self._tokens[self.domain] += count

    def visit(self, call: ExpertCall) -> None:
        """Counts one call of the experts of a layer."""
        row = self._row[call.module_name]
        chosen = call.chosen.cpu()
        taken = torch.zeros((len(chosen), call.expert_count), dtype=torch.float64)
        weights = torch.zeros_like(taken).scatter_add_(1, chosen, call.gate_weight.double().cpu())
        taken.scatter_(1, chosen, 1.0)
        # Counts below 2^53 are exact in float64.
        self._visits[self.domain, row] += taken.sum(dim=0).to(torch.int64).numpy()
        self._gate_weight[self.domain, row] += weights.sum(dim=0).numpy()
        self._together[row] += (taken.T @ taken).to(torch.int64).numpy()

    def statistics(self) -> RoutingStatistics:
        """Returns what was counted."""
        return RoutingStatistics(
            layers=tuple(map(layer_index_of, self._row)),
            domains=self._domains,
            tokens=self._tokens,
            visits=self._visits,
            gate_weight=self._gate_weight,
            together=self._together,
        )


@torch.no_grad()
def measure_routing(
    model: Any, tokens: Tensor, *, domains: Sequence[str] | None = None, residency: Residency | None = None
) -> RoutingStatistics:
    """Returns the routing statistics of a model on some text, from one pass.

    Args:
        model: A mixture of experts.
        tokens: [S, T] int64.
        domains: Name of every sequence's domain, or None for one domain.
        residency: Brings the weights into memory, each layer's once; None where they all are.

    Raises:
        ValueError: If the model has no experts or layers with different numbers of them, or the domains are not S.
        NotLayerwise: If the layers cannot be run one by one, where they have to be.
    """
    of_sequence = list(domains) if domains is not None else [ALL_TEXT] * len(tokens)
    if len(of_sequence) != len(tokens):
        msg = f"domains must name one domain a sequence: got {len(of_sequence)} for {len(tokens)} sequences."
        raise ValueError(msg)
    names = list(dict.fromkeys(of_sequence))
    counter = RoutingCounter(model, names)

    def begin(s: int) -> None:
        counter.domain = names.index(of_sequence[s])

    layers = None if residency is None else LayerwiseModel(model, tokens[:1], residency)
    with watched_experts(model, counter.visit):
        for s, sequence in enumerate(tokens):
            begin(s)
            counter.add_tokens(len(sequence))
            if layers is None:
                model(sequence.unsqueeze(0), use_cache=False)
        if layers is not None:
            layers.run_layers(tokens, begin)
    return counter.statistics()


def measure_router_shift(
    model: Any, formats_by_weight: Mapping[str, str], tokens: Tensor, *, quantizer: RenderingRule = "rtn"
) -> RouterShift:
    """Returns how far the routing of the model with formats is from the reference model's.

    Args:
        model: The reference model, a mixture of experts.
        formats_by_weight: Weight name -> format name; weights not named keep their values.
        tokens: [S, T] int64.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.

    Raises:
        ValueError: If the model has no experts, a weight or format is unknown, or a format does not fit.
    """
    reference = _choices(model, tokens)
    with simulated_formats(model, formats_by_weight, quantizer=quantizer):
        quantized = _choices(model, tokens)
    changed, overlap = [], []
    for layer, ours in reference.items():
        # [N, k, k]: no expert is in a token's choice twice.
        common = (ours[:, :, None] == quantized[layer][:, None, :]).any(dim=-1).double().mean(dim=-1)
        changed.append(float((common < 1.0).double().mean()))
        overlap.append(float(common.mean()))
    return RouterShift(
        layers=tuple(reference), changed=np.array(changed), overlap=np.array(overlap), tokens=tokens.numel()
    )


@torch.no_grad()
def _choices(model: Any, tokens: Tensor) -> dict[int, Tensor]:
    """Returns layer index -> the experts [N, k] of every token."""
    found: dict[int, list[Tensor]] = {}
    with watched_experts(model, lambda call: found.setdefault(call.layer_index, []).append(call.chosen.cpu())):
        for sequence in tokens:
            model(sequence.unsqueeze(0), use_cache=False)
    return {layer: torch.cat(parts) for layer, parts in found.items()}
