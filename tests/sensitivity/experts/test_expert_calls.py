"""What experts are called with, and running some of them alone."""

import pytest
import torch

from sensitivity.experts.expert_calls import ExpertCall, eager_experts, run_experts, watched_experts
from tests.mixtures import MIXTURES
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_mixtral

TOKENS = torch.randint(2, VOCABULARY_SIZE, (1, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_run_alone_add_up_to_the_layer(name: str) -> None:
    model = MIXTURES[name].build().requires_grad_(False)
    calls: list[ExpertCall] = []
    with watched_experts(model, calls.append):
        model(TOKENS)
    assert len(calls) == 2
    with eager_experts(model):
        for call in calls:
            whole = call.module.forward(call.hidden, call.chosen, call.gate_weight)
            total, pairs = torch.zeros_like(whole), torch.zeros_like(whole)
            for e in range(call.expert_count):
                tokens, weight = call.tokens_of(e)
                assert tokens.tolist() == [t for t, row in enumerate(call.chosen.tolist()) if e in row]
                assert weight.tolist() == [call.gate_weight[t, call.chosen[t].tolist().index(e)] for t in tokens]
                if len(tokens):
                    total[tokens] += run_experts(call, (e,), tokens)
            for pair in torch.arange(call.expert_count).view(-1, 2).tolist():
                tokens = torch.isin(call.chosen, torch.tensor(pair)).any(dim=-1).nonzero().flatten()
                pairs[tokens] += run_experts(call, tuple(pair), tokens)
            # The same few products in another order of summing.
            torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(pairs, whole, rtol=1e-5, atol=1e-6)


def test_experts_called_by_keyword_are_seen() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    calls: list[ExpertCall] = []
    with watched_experts(model, calls.append):
        model(TOKENS)
        hidden, chosen, weight = calls[0].hidden, calls[0].chosen, calls[0].gate_weight
        calls[0].module(hidden, top_k_weights=weight, top_k_index=chosen)
    assert torch.equal(calls[2].chosen, chosen)
    assert torch.equal(calls[2].gate_weight, weight)
    assert calls[2].layer_index == 0


def test_implementation_comes_back_after_a_failure() -> None:
    model = build_tiny_mixtral()
    model.config._experts_implementation = "grouped_mm"
    with pytest.raises(IndexError), eager_experts(model):
        assert model.config._experts_implementation == "eager"
        model(torch.full((1, 4), VOCABULARY_SIZE))
    assert model.config._experts_implementation == "grouped_mm"
