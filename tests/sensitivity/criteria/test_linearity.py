"""Coefficients of the head against their closed form, the square law, and that the model is left as it was."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from runtime.units import find_units, read_weight
from sensitivity.criteria.linearity import measure_linearity_coefficients
from tests.sensitivity.captured_inputs import capture_inputs
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral

TOKENS = torch.randint(0, VOCABULARY_SIZE, (4, 12), generator=torch.Generator().manual_seed(0))


def test_coefficient_of_the_head_is_its_fisher_information() -> None:
    model = build_tiny_llama().requires_grad_(False)
    [head] = [unit for unit in find_units(model) if unit.kind == "head"]
    draws = 50
    found, _ = measure_linearity_coefficients(model, [head], TOKENS, seed=0, relative_size=0.02, draws=draws)
    # z = W h: noise of variance s^2 in every entry of W gives logits independent noise of s^2 |h|^2, whose variance
    # under p is on average s^2 |h|^2 (1 - sum p^2); KL is half of that, and s^2 = t^2 |W|^2 / N.
    hidden = capture_inputs(model, TOKENS)["lm_head.weight"]
    p = torch.softmax(model(TOKENS).logits.flatten(0, 1).double(), dim=-1)
    weight = read_weight(model, head.weights[0]).double()
    per_token = hidden.square().sum(dim=-1) * (1.0 - p.square().sum(dim=-1))
    exact = 0.5 * float(weight.square().mean() * per_token.mean())
    # Each draw sums some 300 independent terms for each of few independent tokens: 10 % for one draw, 1.4 % for 50;
    # the next order of t is 2 %.
    assert found[0] == pytest.approx(exact, rel=0.08)


def test_square_law(model: PreTrainedModel) -> None:
    # Where no later router can send a token elsewhere for the noise.
    mixture = any(unit.kind == "expert" for unit in find_units(model))
    units = [
        u for u in find_units(model) if not mixture or u.kind == "head" or (u.kind, u.layer_index) == ("expert", 1)
    ]
    small, large = (
        measure_linearity_coefficients(model, units, TOKENS, seed=3, relative_size=t)[0] for t in (0.02, 0.04)
    )
    # The same noise twice as large: four times the KL up to the next order, about t. Rounding: 1e-7 nats over t^2,
    # which is also what an expert costs that no token visits.
    np.testing.assert_allclose(large, small, rtol=0.2, atol=1e-3)
    assert np.sum(small > 5e-3) > 3


def test_draws_are_averaged_and_error_is_that_of_the_sequences() -> None:
    model = build_tiny_llama().requires_grad_(False)
    units = find_units(model)[:2]
    alone = [measure_linearity_coefficients(model, units, TOKENS[[s, s]], seed=1)[0] for s in range(len(TOKENS))]
    together, std_error = measure_linearity_coefficients(model, units, TOKENS, seed=1)
    np.testing.assert_allclose(together, np.mean(alone, axis=0), rtol=1e-3)
    np.testing.assert_allclose(std_error, np.std(alone, axis=0, ddof=1) / 2, rtol=1e-2)


def test_model_is_left_as_it_was_and_seed_decides(model: PreTrainedModel) -> None:
    before = {name: (p.data.data_ptr(), p.data.clone()) for name, p in model.named_parameters()}
    units = find_units(model, fuse=[r"self_attn\.(q|k|v)_proj"])
    first = measure_linearity_coefficients(model, units, TOKENS, seed=5)
    for name, parameter in model.named_parameters():
        address, values = before[name]
        assert parameter.data.data_ptr() == address
        assert torch.equal(parameter.data, values)
    # Of any units before: the noise of a unit depends on the seed and its index.
    again = measure_linearity_coefficients(model, units[:3], TOKENS, seed=5)
    np.testing.assert_array_equal(again[0], first[0][:3])
    other, _ = measure_linearity_coefficients(model, units[:3], TOKENS, seed=6)
    assert np.all(other != first[0][:3])
    twice, _ = measure_linearity_coefficients(model, [units[0], units[0]], TOKENS, seed=5)
    assert twice[0] != twice[1]


def test_only_the_expert_itself_is_disturbed() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    units = [unit for unit in find_units(model) if unit.kind == "expert" and unit.layer_index == 1]
    one_token = TOKENS[:2, :1]
    inputs = capture_inputs(model, one_token)
    coefficients, _ = measure_linearity_coefficients(model, units, one_token, seed=0)
    visited = [len(inputs[unit.weights[0].name]) > 0 for unit in units]
    assert 0 < sum(visited) < len(visited)
    # Rounding of float32 log-probabilities, 1e-7 nats, over t^2 = 0.01.
    assert np.all(np.abs(coefficients[np.logical_not(visited)]) < 1e-4)
    assert np.all(coefficients[visited] > 1e-4)


def test_what_cannot_be_measured_is_refused() -> None:
    model = build_tiny_llama().requires_grad_(False)
    units = find_units(model)[:1]
    for settings in ({"relative_size": 0.0}, {"relative_size": float("nan")}, {"draws": 0}):
        with pytest.raises(ValueError, match="noise must have a positive relative_size and at least one draw: got"):
            measure_linearity_coefficients(model, units, TOKENS, seed=0, **settings)
    with pytest.raises(ValueError, match="tokens must hold at least two sequences .* got 1"):
        measure_linearity_coefficients(model, units, TOKENS[:1], seed=0)
