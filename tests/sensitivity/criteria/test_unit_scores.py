"""Scores of units against closed forms, scipy and the inputs that hooks see; the rule that makes tables of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from transformers import PreTrainedModel

from runtime.units import find_units, read_weight
from sensitivity.criteria.statistics import ModelStatistics, measure_statistics
from sensitivity.criteria.unit_scores import (
    score_kurtosis,
    score_layer_influence,
    score_max_variance,
    score_mean_variance,
    score_outlier_ratio,
    score_z_distribution,
    spread_over_formats,
)
from tests.sensitivity.captured_inputs import capture_inputs
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral

TOKENS = torch.randint(0, VOCABULARY_SIZE, (3, 11), generator=torch.Generator().manual_seed(0))
TOLERANCE = 500 * torch.finfo(torch.float32).eps


def one_weight(values: torch.Tensor) -> nn.Module:
    network = nn.Sequential(nn.Linear(values.shape[1], values.shape[0], bias=False))
    network[0].weight.data = values
    return network.requires_grad_(False)


@pytest.mark.parametrize("spikes", [1, 4, 30])
def test_rare_spikes_in_zeros(spikes: int) -> None:
    values = torch.zeros(400)
    values[:spikes] = 3.0
    values[spikes : 2 * spikes] = -3.0
    network = one_weight(values.reshape(20, 20))
    units = find_units(network)
    # The mean is zero and the variance 9 * 2 spikes / 400: every spike lies beyond one deviation, every zero within.
    assert score_kurtosis(network, units) == pytest.approx([400 / (2 * spikes)], rel=1e-5)
    assert score_z_distribution(network, units) == pytest.approx([1 - 2 * spikes / 400], rel=1e-12)


def test_constant_weights_have_no_tails() -> None:
    network = one_weight(torch.full((4, 6), 0.5))
    assert score_kurtosis(network, find_units(network)).tolist() == [1.0]
    assert score_z_distribution(network, find_units(network)).tolist() == [1.0]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), exponent=st.integers(-8, 8), power=st.sampled_from([1, 3]))
def test_shape_of_the_distribution_does_not_depend_on_its_scale(seed: int, exponent: int, power: int) -> None:
    values = torch.randn(15, 31, generator=torch.Generator().manual_seed(seed)) ** power
    plain, scaled = one_weight(values), one_weight(values * 2.0**exponent)
    units = find_units(plain)
    kurtosis = score_kurtosis(plain, units)
    assert kurtosis == pytest.approx([stats.kurtosis(values.double().numpy(), axis=None, fisher=False)], rel=1e-4)
    z = np.abs(stats.zscore(values.double().numpy(), axis=None))
    assert score_z_distribution(plain, units) == pytest.approx([(z <= 1).mean()], abs=1 / values.numel())
    # A power of two changes no rounding.
    assert score_kurtosis(scaled, units) == pytest.approx(kurtosis, rel=1e-12)
    np.testing.assert_array_equal(score_z_distribution(scaled, units), score_z_distribution(plain, units))


def test_a_unit_of_several_weights_has_their_mean_by_count() -> None:
    model = build_tiny_llama().requires_grad_(False)
    single, fused = find_units(model), find_units(model, fuse=[r"self_attn\.(q|k)_proj"])
    scores = dict(zip([u.name for u in single], score_kurtosis(model, single), strict=True))
    [unit] = [u for u in fused if len(u.weights) == 2 and u.layer_index == 0]
    found = score_kurtosis(model, [unit])[0]
    q, k = (scores[f"model.layers.0.self_attn.{name}_proj"] for name in "qk")
    # k has half as many weights as q (2 of 4 heads).
    assert found == pytest.approx((2 * q + k) / 3, rel=1e-12)


def test_scores_of_inputs(model: PreTrainedModel) -> None:
    units = find_units(model)
    statistics = measure_statistics(model, TOKENS)
    inputs = capture_inputs(model, TOKENS)
    mean, largest = score_mean_variance(units, statistics), score_max_variance(units, statistics)
    ratio = score_outlier_ratio(units, statistics)
    for u, unit in enumerate(units):
        [weight] = unit.weights
        variances = []
        if len(inputs.get(weight.name, ())):
            variances.append(inputs[weight.name].numpy().var(axis=0))
        if unit.kind == "embedding":
            variances.append(np.eye(VOCABULARY_SIZE)[TOKENS.flatten().numpy()].var(axis=0))
        if not variances:
            assert np.isnan([mean[u], largest[u], ratio[u]]).all()
            continue
        assert mean[u] == pytest.approx(sum(v.mean() for v in variances), rel=TOLERANCE)
        assert largest[u] == pytest.approx(sum(v.max() for v in variances), rel=TOLERANCE)
        read = statistics.inputs.get(weight.name)
        assert ratio[u] == (1.0 if read is None else read.outlier_ratio)
        assert ratio[u] >= 1.0


def test_influence_is_that_of_the_layer(model: PreTrainedModel) -> None:
    units = find_units(model)
    statistics = measure_statistics(model, TOKENS)
    for unit, score in zip(units, score_layer_influence(units, statistics), strict=True):
        if unit.layer_index is None:
            assert np.isnan(score)
        else:
            assert score == 1.0 - statistics.layer_cosine[unit.layer_index]
            assert 0.0 < score < 2.0


def statistics_of_one_token() -> tuple[PreTrainedModel, ModelStatistics]:
    model = build_tiny_mixtral().requires_grad_(False)
    return model, measure_statistics(model, TOKENS[:1, :1])


def test_expert_that_no_token_visits_has_no_score() -> None:
    model, statistics = statistics_of_one_token()
    units = find_units(model)
    score = score_outlier_ratio(units, statistics)
    assert np.isnan(score).sum() == 2 * 2 * 2  # two of four experts, two matrices, two layers
    table = spread_over_formats(score, np.ones((len(units), 3)))
    assert np.isfinite(table).all()
    np.testing.assert_array_equal(table[np.isnan(score)], np.nanmax(score))


def test_a_unit_with_visited_and_other_experts_has_the_mean_of_the_visited() -> None:
    model, statistics = statistics_of_one_token()
    [stack] = [u for u in find_units(model, fuse=[r"\[\d+\]"]) if "layers.0.mlp.experts.down_proj" in u.name]
    values = [statistics.inputs[w.name].outlier_ratio for w in stack.weights if w.name in statistics.inputs]
    assert len(values) == 2 < len(stack.weights)
    assert score_outlier_ratio([stack], statistics) == pytest.approx([np.mean(values)], rel=1e-12)


def test_rule_is_score_times_error() -> None:
    table = spread_over_formats(np.array([2.0, np.nan, 5.0]), np.array([[1.0, 0.5], [1.0, 0.0], [0.1, 0.2]]))
    np.testing.assert_allclose(table, [[2.0, 1.0], [5.0, 0.0], [0.5, 1.0]])


def test_no_score_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one unit must have a score: got none among 2 units"):
        spread_over_formats(np.full(2, np.nan), np.ones((2, 1)))


def test_scores_leave_the_weights_alone() -> None:
    model = build_tiny_llama().requires_grad_(False)
    units = find_units(model)
    before = [read_weight(model, u.weights[0]).clone() for u in units]
    score_kurtosis(model, units), score_z_distribution(model, units)
    assert all(torch.equal(read_weight(model, u.weights[0]), w) for u, w in zip(units, before, strict=True))
