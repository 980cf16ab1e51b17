"""Balanced self-sampling against a search without cache that runs every continuation from its start."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sensitivity.experts.routing import spread
from sensitivity.experts.routing_measurement import measure_routing
from sensitivity.experts.self_sampling import BalancedSampling, sample_balanced_sequences
from tests.mixtures import MIXTURES
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral, build_tokenizer

TOKENIZER = build_tokenizer()


def sample(model: Any, sampling: BalancedSampling, *, sequences: int = 3, tokens: int = 6, seed: int = 0) -> Tensor:
    return sample_balanced_sequences(
        model, TOKENIZER, sequences=sequences, sequence_tokens=tokens, seed=seed, sampling=sampling
    ).tokens


@torch.no_grad()
def score_from_start(model: Any, tokens: list[int], temperature: float, earlier: Tensor | None) -> float:
    """Returns -(sum of log P) / |c| + sigma / tau of tokens after the begin-of-text token, lower is better."""
    whole = torch.tensor([[TOKENIZER.bos_token_id, *tokens]])
    log_p = model(whole).logits[0, :-1].log_softmax(dim=-1)
    likelihood = sum(float(log_p[t, token]) for t, token in enumerate(tokens) if t > 0)
    everything = [whole] if earlier is None else [whole, *earlier]
    # Visits with the begin-of-text token less those without the rest; k experts a token.
    visits = sum(measure_routing(model, text).expert_visits for text in everything)
    visits -= sum(measure_routing(model, text[:, :1]).expert_visits for text in everything)
    count = sum(text.shape[1] - 1 for text in everything)
    return -likelihood / len(tokens) + float(spread(visits / count).mean()) / temperature


@torch.no_grad()
def search_from_start(
    model: Any, first: int, length: int, sampling: BalancedSampling, earlier: Tensor | None = None
) -> list[int]:
    beams = [[first]]
    while len(beams[0]) < length:
        continuations = []
        for beam in beams:
            logits = model(torch.tensor([[TOKENIZER.bos_token_id, *beam]])).logits[0, -1]
            continuations += [[*beam, token] for token in logits.topk(sampling.branches).indices.tolist()]
        continuations.sort(key=lambda c: score_from_start(model, c, sampling.temperature, earlier))
        beams = continuations[: sampling.beams]
    return beams[0]


@pytest.mark.parametrize("temperature", [0.02, 1.2, 1e9])
@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v3"])
def test_search_keeps_the_lowest_scores(name: str, temperature: float) -> None:
    model = MIXTURES[name].build().requires_grad_(False)
    sampling = BalancedSampling(beams=3, branches=2, temperature=temperature, batch=2)
    tokens = sample(model, sampling)
    for row in tokens.tolist():
        assert row == search_from_start(model, row[0], 6, sampling)


def test_experts_of_finished_sequences_count_when_carried() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    sampling = BalancedSampling(beams=2, branches=3, temperature=0.02, batch=1, carried=True)
    tokens = sample(model, sampling)
    begin = torch.full((1, 1), TOKENIZER.bos_token_id)
    finished: list[Tensor] = []
    for row in tokens:
        assert row.tolist() == search_from_start(model, int(row[0]), 6, sampling, earlier=finished or None)
        finished.append(torch.cat([begin, row[None]], dim=1))
    assert not torch.equal(tokens, sample(model, BalancedSampling(beams=2, branches=3, temperature=0.02, batch=1)))


def test_one_beam_without_balance_is_greedy() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    tokens = sample(model, BalancedSampling(beams=1, branches=1), tokens=8)
    for row in tokens:
        begun = torch.cat([torch.tensor([TOKENIZER.bos_token_id]), row])
        assert torch.equal(model(begun[None]).logits[0, 1:-1].argmax(dim=-1), row[1:])


@pytest.mark.parametrize("drawn", [False, True])
def test_text_depends_on_the_seed_alone(drawn: bool) -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    sampling = BalancedSampling(drawn=drawn)
    tokens = sample(model, sampling, sequences=5, tokens=7)
    assert tokens.shape == (5, 7) and tokens.dtype == torch.int64
    assert torch.equal(tokens, sample(model, sampling, sequences=5, tokens=7))
    assert not torch.equal(tokens, sample(model, sampling, sequences=5, tokens=7, seed=1))
    assert not torch.isin(tokens[:, 0], torch.tensor(TOKENIZER.all_special_ids)).any()


def test_drawn_tokens_follow_the_models_distribution() -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    # One beam and one branch draw one token a step: the second tokens of many sequences are plain samples.
    sampling = BalancedSampling(beams=1, branches=1, drawn=True, batch=500)
    tokens = sample(model, sampling, sequences=2000, tokens=2)
    begun = torch.cat([torch.full((2000, 1), TOKENIZER.bos_token_id), tokens[:, :1]], dim=1)
    expected = torch.cat([model(part).logits[:, -1].softmax(dim=-1) for part in begun.split(500)])
    chance = expected.gather(1, tokens[:, 1:]).double()
    # E p(drawn) = sum p^2; its standard error from the variance of p under p.
    mean = expected.square().sum(dim=-1).mean()
    error = ((expected**3).sum(dim=-1) - expected.square().sum(dim=-1) ** 2).mean().sqrt() / 2000**0.5
    assert abs(float(chance.mean() - mean)) < 4 * float(error)


def test_low_temperatures_balance_the_experts() -> None:
    model = build_tiny_mixtral().requires_grad_(False)

    def spread_of(temperature: float) -> float:
        tokens = sample(model, BalancedSampling(temperature=temperature), sequences=8, tokens=24)
        return float(np.mean([measure_routing(model, row[None]).usage_spread.mean() for row in tokens]))

    assert spread_of(0.02) < 0.8 * spread_of(1e9)


@pytest.mark.parametrize("name", ["beams", "branches", "temperature", "batch"])
def test_settings_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be above 0: got {name}=0"):
        BalancedSampling(**{name: 0})  # type: ignore[arg-type]


def test_dense_models_are_refused() -> None:
    with pytest.raises(ValueError, match="must be a mixture of experts"):
        sample(build_tiny_llama(), BalancedSampling())
