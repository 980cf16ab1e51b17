"""Thresholds of skipped experts: quantiles of what the model's own routers give."""

import numpy as np
import pytest
import torch

from runtime.expert_skipping import skipped_experts
from sensitivity.experts.expert_calls import ExpertCall, watched_experts
from sensitivity.experts.skip_calibration import calibrate_skipping
from tests.mixtures import build_tiny_olmoe, build_tiny_qwen3_moe
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral

TOKENS = torch.randint(2, 320, (6, 25), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("build", [build_tiny_mixtral, build_tiny_qwen3_moe, build_tiny_olmoe])
@pytest.mark.parametrize("quantile", [0.25, 0.5])
def test_numbers_are_the_quantiles(build: object, quantile: float) -> None:
    assert callable(build)
    model = build()
    ratios: dict[int, list[float]] = {}
    norms: dict[int, list[float]] = {}

    def visit(call: ExpertCall) -> None:
        for x, weights in zip(call.hidden.tolist(), call.gate_weight.tolist(), strict=True):
            first, second, *_ = sorted(weights, reverse=True)
            ratios.setdefault(call.layer_index, []).append(second / first)
            norms.setdefault(call.layer_index, []).append(sum(map(abs, x)))

    with torch.no_grad(), watched_experts(model, visit):
        model(TOKENS, use_cache=False)
    skipping = calibrate_skipping(model, TOKENS, quantile=quantile, protected_share=0.1, weights_fingerprint="ab")
    assert skipping.layers == tuple(ratios)
    assert skipping.weights_fingerprint == "ab"
    for layer, ratio, magnitude in zip(skipping.layers, skipping.ratio, skipping.magnitude, strict=True):
        assert ratio == pytest.approx(np.quantile(ratios[layer], quantile), rel=1e-5)
        assert magnitude == pytest.approx(np.quantile(norms[layer], 0.9), rel=1e-5)


def test_half_of_the_tokens_skip_their_second_expert_at_the_median() -> None:
    model = build_tiny_mixtral()
    skipping = calibrate_skipping(model, TOKENS, protected_share=0.0)
    assert skipping.magnitude == (None, None)
    with torch.no_grad(), skipped_experts(model, skipping) as count:
        model(TOKENS, use_cache=False)
    # The first layer's inputs are those of the calibration; the second's change a little with what was skipped.
    assert count.skipped_share == pytest.approx(0.25, abs=0.02)


def test_what_has_no_second_expert_is_refused() -> None:
    single = build_tiny_mixtral()
    for layer in single.model.layers:
        layer.mlp.gate.top_k = 1
    with pytest.raises(ValueError, match="where a token takes at least two: got 1 in layer 0"):
        calibrate_skipping(single, TOKENS)
    with pytest.raises(ValueError, match="a model must be a mixture of experts"):
        calibrate_skipping(build_tiny_llama(), TOKENS)
    with pytest.raises(ValueError, match=r"quantile must be from 0 to 1: got quantile=1.5"):
        calibrate_skipping(build_tiny_mixtral(), TOKENS, quantile=1.5)
    with pytest.raises(ValueError, match=r"protected_share must be from 0 to 1: got protected_share=-0.1"):
        calibrate_skipping(build_tiny_mixtral(), TOKENS, protected_share=-0.1)
