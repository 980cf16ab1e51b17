"""Affinity-guided second moments: the inputs of an expert weighted by how much its output counts.

Where token t takes expert E, the layer's output holds c_t E(x_t) with the gate weight c_t, so an error of the expert
counts by it. MoEQuant gives every expert the Hessian

    H_E = sum over its tokens of c_t x_t x_t',

with c to the first power: its code multiplies the inputs by sqrt(c). (The square of an error c_t D x_t would give c^2;
``power`` chooses: 1 as published, 2 for the error of the layer's output, 0 for the plain second moment.) It is taken
for both projections, x_t being the hidden state or what the activation gives, each for the same tokens. A GPTQ
quantizer takes H_E as it takes any second moment; divided by the sum of the weights (``mass``) it is their mean.

The estimator is the output error tr(D H D') per token with these moments for experts, and the plain ones for all
other weights, so a table holds two scales: gate weights are below one.

Complexity: one pass of the model and one of every expert on its tokens. Memory: one in_features^2 matrix for each
expert and projection.
Source: Chen et al. 2025, "MoEQuant", arXiv:2505.03804, section on affinity-guided quantization.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from runtime.candidates import Candidates
from runtime.rendering import RenderingRule, render_weight
from runtime.units import read_weight
from sensitivity.criteria.output_error import measure_output_error
from sensitivity.experts.expert_calls import ExpertCall, eager_experts, run_experts, watched_experts


@dataclass(frozen=True, kw_only=True, eq=False)
class AffinityMoments:
    """Second moments of the inputs of every expert that a token took.

    Args:
        moments: Weight name -> [in_features, in_features] float32, sum of c^power x x'.
        mass: Weight name -> sum of c^power.
        tokens: Number of tokens that were run, whether or not they took the expert.
    """

    moments: Mapping[str, Tensor]
    mass: Mapping[str, float]
    tokens: int


@torch.no_grad()
def measure_affinity_moments(model: Any, tokens: Tensor, *, power: float = 1.0) -> AffinityMoments:
    """Returns the second moments of every expert's inputs, weighted by powers of the gate weights.

    Args:
        model: The reference model in float32, a mixture of experts.
        tokens: [S, T] int64.
        power: Power of the gate weights; 0 gives the plain second moments.

    Raises:
        ValueError: If the model has no experts, or a gate weight is negative.
    """
    moments: dict[str, Tensor] = {}
    mass: dict[str, float] = {}

    def visit(call: ExpertCall) -> None:
        for expert in torch.unique(call.chosen).tolist():
            taking, gate_weight = call.tokens_of(expert)
            if float(gate_weight.min()) < 0.0:
                msg = (
                    f"gate weights must not be negative: got {float(gate_weight.min())} for expert {expert} of "
                    f"'{call.module_name}'. Use output_error for this model."
                )
                raise ValueError(msg)
            weights = gate_weight.double() ** power
            with _ScaledProducts(weights.sqrt()) as products:
                run_experts(call, (expert,), taking)
            for name, address in _addresses(call, expert).items():
                moment = products.of_weight[address]
                moments[name] = moments[name].add_(moment) if name in moments else moment
                mass[name] = mass.get(name, 0.0) + float(weights.sum())

    with eager_experts(model), watched_experts(model, visit):
        for sequence in tokens:
            model(sequence.unsqueeze(0), use_cache=False)
    return AffinityMoments(moments=moments, mass=mass, tokens=tokens.numel())


def measure_affinity_error(
    model: Any, candidates: Candidates, tokens: Tensor, *, quantizer: RenderingRule = "rtn", power: float = 1.0
) -> NDArray[np.float64]:
    """Returns the output error [U, F] per token, that of experts weighted by affinity (zero where not allowed).

    Args:
        model: The reference model in float32, a mixture of experts.
        candidates: Units and formats.
        tokens: [S, T] int64.
        quantizer: Name in ``QUANTIZERS``, or a ``Rendering``.
        power: Power of the gate weights; 1 as published.

    Raises:
        ValueError: If the model has no experts, or a gate weight is negative.
    """
    is_expert = np.array([unit.kind == "expert" for unit in candidates.units])
    others = replace(candidates, allowed=candidates.allowed & ~is_expert[:, None])
    error = measure_output_error(model, others, tokens, quantizer=quantizer)
    measured = measure_affinity_moments(model, tokens, power=power)
    for u, f in zip(*np.nonzero(candidates.allowed & is_expert[:, None]), strict=True):
        for weight in candidates.units[u].weights:
            if (moment := measured.moments.get(weight.name)) is not None:
                values = read_weight(model, weight)
                difference = render_weight(weight, values, candidates.formats[f], quantizer) - values
                error[u, f] += float(((difference @ moment) * difference).sum()) / measured.tokens
    return error


class _ScaledProducts(TorchFunctionMode):
    """Keeps x' diag(s)^2 x of what ``linear`` multiplies with each weight, by the weight's address.

    Args:
        scale: [rows], s.
    """

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self._scale = scale
        self.of_weight: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.linear:
            rows = args[0].to(torch.float32) * self._scale[:, None].to(torch.float32)
            self.of_weight[args[1].data_ptr()] = rows.T @ rows
        return func(*args, **(kwargs or {}))


def _addresses(call: ExpertCall, expert: int) -> dict[str, int]:
    """Returns weight name -> address of one expert's matrices."""
    return {
        f"{call.module_name}.{name}[{expert}]": parameter[expert].data_ptr()
        for name, parameter in call.module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }
