"""The expert error against whole outputs of the layer, and MC-MoE's loss against the solvers' formula."""

import numpy as np
import pytest
import torch

from runtime.apply import simulated_formats
from runtime.candidates import list_candidates
from runtime.units import find_units
from sensitivity.experts.expert_calls import ExpertCall, eager_experts, watched_experts
from sensitivity.experts.expert_error import experts_of, measure_expert_error, weigh_by_routing
from sensitivity.experts.routing_measurement import measure_routing
from solvers.baselines.block_budgets import weigh_expert_errors
from tests.mixtures import MIXTURES
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral

FORMATS = ("int2_g32", "int4_g32", "bf16")
TOKENS = torch.randint(2, VOCABULARY_SIZE, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("experts", ["projection", "expert", "stack"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@torch.no_grad()
def test_error_is_that_of_the_layers_output(name: str, experts: str) -> None:
    model = MIXTURES[name].build().requires_grad_(False)
    candidates = list_candidates(find_units(model, experts=experts), FORMATS)
    error = measure_expert_error(model, candidates, TOKENS)
    calls: list[ExpertCall] = []
    with watched_experts(model, calls.append):
        for sequence in TOKENS:
            model(sequence[None])
    with eager_experts(model):
        outputs = [call.module.forward(call.hidden, call.chosen, call.gate_weight) for call in calls]
    for u, unit in enumerate(candidates.units):
        for f, format_ in enumerate(candidates.formats):
            expected = 0.0
            if unit.kind == "expert":
                with simulated_formats(model, {weight.name: format_.name for weight in unit.weights}):
                    for call, output in zip(calls, outputs, strict=True):
                        changed = call.module.forward(call.hidden, call.chosen, call.gate_weight)
                        expected += float((changed - output).double().norm())
            # The difference of float32 outputs of size one, a few of them for each of some hundred entries.
            assert error[u, f] == pytest.approx(expected, rel=1e-4, abs=2e-5), (unit.name, format_.name)


def test_measuring_leaves_the_weights() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    measure_expert_error(model, list_candidates(find_units(model), FORMATS), TOKENS)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_loss_is_mc_moes_in_every_layer() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    candidates = list_candidates(find_units(model, experts="expert"), FORMATS)
    error, routing = measure_expert_error(model, candidates, TOKENS), measure_routing(model, TOKENS)
    loss = weigh_by_routing(error, candidates, routing, alpha=1.0, beta=1.5, gamma=2.0)
    for layer in (0, 1):
        units = [u for u, unit in enumerate(candidates.units) if unit.kind == "expert" and unit.layer_index == layer]
        assert [experts_of(candidates.units[u]) for u in units] == [(0,), (1,), (2,), (3,)]
        expected = weigh_expert_errors(
            error[units],
            frequency=routing.expert_visits[layer].astype(np.float64),
            routing_weight=routing.gate_weight_sum[layer],
        )
        np.testing.assert_allclose(loss[units], expected, rtol=1e-12)
    dense = [u for u, unit in enumerate(candidates.units) if unit.kind != "expert"]
    assert not loss[dense].any()


def test_whole_stacks_have_all_of_the_routing() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    candidates = list_candidates(find_units(model, experts="stack"), FORMATS)
    error = np.ones(candidates.allowed.shape)
    loss = weigh_by_routing(error, candidates, measure_routing(model, TOKENS), alpha=0.7)
    stacks = [u for u, unit in enumerate(candidates.units) if unit.kind == "expert"]
    np.testing.assert_allclose(loss[stacks], 1.0, rtol=1e-12)


def test_dense_models_are_refused() -> None:
    model = build_tiny_llama()
    with pytest.raises(ValueError, match="must be a mixture of experts"):
        measure_expert_error(model, list_candidates(find_units(model), FORMATS), TOKENS)
