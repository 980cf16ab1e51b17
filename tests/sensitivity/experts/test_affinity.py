"""Affinity-weighted second moments against sums over tokens in float64, and their plain limit."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from runtime.candidates import list_candidates
from runtime.rendering import render
from runtime.units import find_units, read_weight
from sensitivity.criteria.output_error import InputSecondMoments, measure_output_error
from sensitivity.experts.affinity import measure_affinity_error, measure_affinity_moments
from sensitivity.experts.expert_calls import ExpertCall, eager_experts, watched_experts
from tests.mixtures import MIXTURES, build_tiny_deepseek_v3
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_mixtral

FORMATS = ("int2_g32", "int4_g32")
TOKENS = torch.randint(2, VOCABULARY_SIZE, (2, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def list_expert_inputs(model: nn.Module) -> dict[str, list[tuple[Tensor, float]]]:
    """Returns weight name -> its inputs [in_features] in float64 with their gate weights, token by token."""
    calls: list[ExpertCall] = []
    with watched_experts(model, calls.append):
        for sequence in TOKENS:
            model(sequence[None])
    found: dict[str, list[tuple[Tensor, float]]] = {}
    for call in calls:
        for x, experts, weights in zip(call.hidden.double(), call.chosen, call.gate_weight.tolist(), strict=True):
            for e, c in zip(experts.tolist(), weights, strict=True):
                gate, up = (call.module.gate_up_proj[e].double() @ x).chunk(2)
                found.setdefault(f"{call.module_name}.gate_up_proj[{e}]", []).append((x, c))
                found.setdefault(f"{call.module_name}.down_proj[{e}]", []).append((nn.functional.silu(gate) * up, c))
    return found


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("name", MIXTURES)
def test_moments_are_weighted_sums_over_tokens(name: str, power: float) -> None:
    model = MIXTURES[name].build().requires_grad_(False)
    measured = measure_affinity_moments(model, TOKENS, power=power)
    inputs = list_expert_inputs(model)
    assert set(measured.moments) == set(measured.mass) == set(inputs)
    assert measured.tokens == 32
    for weight, tokens in inputs.items():
        exact = torch.stack([c**power * torch.outer(x, x) for x, c in tokens]).sum(dim=0)
        scale = float(exact.diagonal().max())
        # Sums of float32 products, whose inputs are float32 results themselves.
        torch.testing.assert_close(measured.moments[weight].double(), exact, rtol=1e-4, atol=1e-5 * scale)
        assert measured.mass[weight] == pytest.approx(sum(c**power for _, c in tokens), rel=1e-6)


@torch.no_grad()
def test_equal_affinity_gives_the_plain_second_moment() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    measured = measure_affinity_moments(model, TOKENS, power=0.0)
    with eager_experts(model), InputSecondMoments(model) as plain:
        for sequence in TOKENS:
            model(sequence[None])
    for name, moment in measured.moments.items():
        torch.testing.assert_close(moment, plain.linear[name], rtol=1e-5, atol=1e-5)
    candidates = list_candidates(find_units(model), FORMATS)
    expected = measure_output_error(model, candidates, TOKENS)
    np.testing.assert_allclose(measure_affinity_error(model, candidates, TOKENS, power=0.0), expected, rtol=1e-5)


def test_error_is_weighted_for_experts_alone() -> None:
    model = build_tiny_deepseek_v3().requires_grad_(False)
    candidates = list_candidates(find_units(model, experts="expert"), FORMATS)
    error = measure_affinity_error(model, candidates, TOKENS)
    plain = measure_output_error(model, candidates, TOKENS)
    inputs = list_expert_inputs(model)
    for (u, f), value in np.ndenumerate(error):
        unit, expected = candidates.units[u], 0.0
        if unit.kind != "expert":
            assert value == plain[u, f]
            continue
        for weight in unit.weights:
            values = read_weight(model, weight)
            difference = (render(values, candidates.formats[f]) - values).double()
            expected += sum(c * float((difference @ x).square().sum()) for x, c in inputs.get(weight.name, []))
        assert value == pytest.approx(expected / 32, rel=1e-4)


def test_negative_gate_weights_are_refused() -> None:
    model = build_tiny_deepseek_v3().requires_grad_(False)
    model.model.layers[1].mlp.gate.routed_scaling_factor = -1.0
    with pytest.raises(ValueError, match=r"gate weights must not be negative: got -.*layers\.1\.mlp\.experts"):
        measure_affinity_moments(model, TOKENS)
