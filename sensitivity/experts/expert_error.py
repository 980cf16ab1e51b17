"""Expert error: what one expert's format changes in the output of its layer's mixture, and MC-MoE's loss from it.

With Z the output of the experts of a layer for the tokens of one sequence, and Z_uf the same with unit u in format f,

    error[u, f] = sum over sequences of ||Z - Z_uf||_F,
    loss[u, f]  = frequency[u]^alpha * gate_weight[u]^beta * error[u, f]^gamma,

frequency and summed gate weight each normalised to sum 1 over the experts of a layer. Only the tokens that take the
expert change, by its gate weight times the error of its output, so only these are run: the error holds frequency and
gate weight once already, and the exponents count them again. The unit is not nats, and losses of different layers are
not on one scale; MC-MoE plans every layer by itself.

Complexity: two passes of an expert's tokens for each of its candidates. Memory: the inputs of all layers' experts.
Limits: units of other weights than experts have no entry. A shared expert is not routed and is one of these.
Source: W. Huang et al. 2024, "MC-MoE", arXiv:2410.06270 (alpha 1, beta 1.5, gamma 2; its code raises the error to
alpha).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.candidates import Candidates
from runtime.formats import Format
from runtime.rendering import RenderingRule, render_weight
from runtime.units import Unit, read_weight
from sensitivity.experts.expert_calls import ExpertCall, eager_experts, run_experts, watched_experts
from sensitivity.experts.routing import RoutingStatistics


@torch.no_grad()
def measure_expert_error(
    model: Any, candidates: Candidates, tokens: Tensor, *, quantizer: RenderingRule = "rtn"
) -> NDArray[np.float64]:
    """Returns the expert error [U, F] of every allowed candidate of an expert unit; zero elsewhere.

    Args:
        model: The reference model, a mixture of experts.
        candidates: Units and formats.
        tokens: [S, T] int64.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.

    Raises:
        ValueError: If the model has no experts.
    """
    calls: dict[str, list[ExpertCall]] = {}
    with watched_experts(model, lambda call: calls.setdefault(call.module_name, []).append(call)):
        for sequence in tokens:
            model(sequence.unsqueeze(0), use_cache=False)
    error = np.zeros(candidates.allowed.shape)
    with eager_experts(model):
        for u, unit in enumerate(candidates.units):
            if unit.kind == "expert":
                _fill_row(error[u], model, candidates, u, calls[_module_name(unit)], quantizer)
    return error


def weigh_by_routing(
    error: NDArray[np.float64],
    candidates: Candidates,
    routing: RoutingStatistics,
    *,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 2.0,
) -> NDArray[np.float64]:
    """Returns MC-MoE's loss [U, F] of every candidate of an expert unit; zero elsewhere. Its unit is not nats.

    Args:
        error: [U, F], the expert error.
        candidates: Units and formats; a unit of several experts has the sum of their frequencies and weights.
        routing: Routing of the text the error was measured on.
        alpha: Exponent of the frequency.
        beta: Exponent of the summed gate weight.
        gamma: Exponent of the error.

    Raises:
        ValueError: If a layer of the candidates is not in the routing.
    """
    loss = np.zeros_like(error)
    visits, weights = routing.expert_visits, routing.gate_weight_sum
    for u, unit in enumerate(candidates.units):
        if unit.kind == "expert":
            row, experts = routing.row_of(unit.layer_index or 0), list(experts_of(unit))
            frequency = visits[row, experts].sum() / visits[row].sum()
            gate_weight = weights[row, experts].sum() / weights[row].sum()
            loss[u] = frequency**alpha * gate_weight**beta * error[u] ** gamma
    return loss


def experts_of(unit: Unit) -> tuple[int, ...]:
    """Returns the indices of the experts that a unit holds weights of, ascending."""
    return tuple(sorted({weight.expert_index for weight in unit.weights if weight.expert_index is not None}))


def _fill_row(
    row: NDArray[np.float64],
    model: nn.Module,
    candidates: Candidates,
    u: int,
    calls: list[ExpertCall],
    quantizer: RenderingRule,
) -> None:
    unit = candidates.units[u]
    experts = experts_of(unit)
    taken = [torch.isin(call.chosen, torch.tensor(experts)).any(dim=-1).nonzero().flatten() for call in calls]
    touched = [(call, tokens) for call, tokens in zip(calls, taken, strict=True) if len(tokens)]
    before = [run_experts(call, experts, tokens) for call, tokens in touched]
    for f in np.flatnonzero(candidates.allowed[u]):
        with _rendered(model, unit, candidates.formats[f], quantizer):
            after = [run_experts(call, experts, tokens) for call, tokens in touched]
        row[f] = sum(float(torch.linalg.norm((a - b).double())) for a, b in zip(after, before, strict=True))


@contextmanager
def _rendered(model: nn.Module, unit: Unit, format_: Format, quantizer: RenderingRule) -> Iterator[None]:
    # In place, expert by expert: simulated_formats copies the whole stack each time.
    weights = [read_weight(model, weight) for weight in unit.weights]
    saved = [values.clone() for values in weights]
    try:
        for weight, values in zip(unit.weights, weights, strict=True):
            values.copy_(render_weight(weight, values, format_, quantizer))
        yield
    finally:
        for values, kept in zip(weights, saved, strict=True):
            values.copy_(kept)


def _module_name(unit: Unit) -> str:
    return unit.weights[0].parameter.rpartition(".")[0]
