"""The statistics of one pass against the inputs that hooks see, and the layers' cosine on rotations."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sensitivity.criteria.output_error import InputSecondMoments, run_under
from sensitivity.criteria.statistics import measure_statistics
from tests.sensitivity.captured_inputs import capture_inputs
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral

TOKENS = torch.randint(0, VOCABULARY_SIZE, (3, 11), generator=torch.Generator().manual_seed(0))
# Inputs are float32 results of some hundred terms; hooks and collector may see them through other kernels.
TOLERANCE = 500 * torch.finfo(torch.float32).eps


def test_channels_are_those_of_the_inputs(model: PreTrainedModel) -> None:
    statistics = measure_statistics(model, TOKENS)
    inputs = {name: rows.numpy() for name, rows in capture_inputs(model, TOKENS).items() if len(rows)}
    assert set(inputs) <= set(statistics.inputs)
    assert statistics.token_count == TOKENS.numel()
    for name, rows in inputs.items():
        found = statistics.inputs[name]
        scale = np.abs(rows).max()
        assert found.rows == len(rows)
        np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=0, atol=TOLERANCE * scale)
        np.testing.assert_allclose(found.variance, rows.var(axis=0), rtol=0, atol=TOLERANCE * scale**2)
        np.testing.assert_allclose(found.largest, np.abs(rows).max(axis=0), rtol=0, atol=TOLERANCE * scale)


def test_outlier_ratio_is_averaged_over_sequences(model: PreTrainedModel) -> None:
    ratios: dict[str, list[float]] = {}
    for sequence in TOKENS:
        for name, rows in capture_inputs(model, sequence.unsqueeze(0)).items():
            if len(rows):
                largest = rows.abs().amax(dim=1).numpy()
                ratios.setdefault(name, []).append(largest.max() / np.median(largest))
    statistics = measure_statistics(model, TOKENS)
    for name, expected in ratios.items():
        assert statistics.inputs[name].outlier_ratio == pytest.approx(np.mean(expected), rel=TOLERANCE)


def test_moments_are_those_of_the_collector_without_statistics(model: PreTrainedModel) -> None:
    statistics = measure_statistics(model, TOKENS)
    moments = InputSecondMoments(model)
    run_under(moments, model, TOKENS)
    assert set(statistics.moments.linear) == set(moments.linear)
    for name, moment in moments.linear.items():
        assert torch.equal(statistics.moments.linear[name], moment)
    for name, counts in moments.embedding.items():
        assert torch.equal(statistics.moments.embedding[name], counts)


def test_expert_that_no_token_visits_has_no_statistics() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    statistics = measure_statistics(model, TOKENS[:1, :1])
    # One token and two of four experts: gate_up and down, in two layers.
    assert sum("experts" in name for name in statistics.inputs) == 2 * 2 * 2


def test_first_layer_cosine_is_that_of_the_hidden_states() -> None:
    model = build_tiny_llama().requires_grad_(False)
    hidden = model(TOKENS, output_hidden_states=True).hidden_states
    first, second = hidden[0].double(), hidden[1].double()
    cosine = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
    statistics = measure_statistics(model, TOKENS)
    assert set(statistics.layer_cosine) == {0, 1}
    assert statistics.layer_cosine[0] == pytest.approx(float(cosine.mean()), rel=TOLERANCE)


class Turn(nn.Module):
    """A layer that turns its input by an angle, and gives a tuple as some layers do."""

    def __init__(self, angle: float, in_tuple: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(2, 2, bias=False)
        cosine, sine = math.cos(angle), math.sin(angle)
        self.proj.weight.data = torch.tensor([[cosine, -sine], [sine, cosine]])
        self.in_tuple = in_tuple

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, None]:
        turned = self.proj(hidden_states)
        return (turned, None) if self.in_tuple else turned


class Turns(nn.Module):
    """Turns one after another; the second is called by the name of its argument."""

    def __init__(self, angles: tuple[float, float]) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.layers = nn.ModuleList([Turn(angles[0], True), Turn(angles[1], False)])

    def forward(self, tokens: Tensor, use_cache: bool) -> Tensor:
        first, _ = self.layers[0](self.embed(tokens))
        second: Tensor = self.layers[1](hidden_states=first)
        return second


def test_layers_that_turn_have_the_cosine_of_their_angle() -> None:
    model = Turns((0.3, 2.5)).requires_grad_(False)
    cosine = measure_statistics(model, torch.tensor([[0, 1, 2], [3, 3, 0]])).layer_cosine
    assert cosine == pytest.approx({0: math.cos(0.3), 1: math.cos(2.5)}, rel=1e-6)
    assert not any(layer._forward_hooks for layer in model.layers)


def test_outlier_ratio_where_most_rows_are_zero() -> None:
    model = Turns((0.0, 0.0)).requires_grad_(False)
    model.embed.weight.data = torch.tensor([[0.0, 0.0], [5.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    tokens = torch.tensor([[0, 0, 1], [2, 3, 1]])
    ratio = measure_statistics(model, tokens).inputs["layers.0.proj.weight"].outlier_ratio
    assert ratio == pytest.approx((1.0 + 5.0 / 1.0) / 2)
