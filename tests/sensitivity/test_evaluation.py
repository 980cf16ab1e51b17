"""Evaluation against a plain computation in float64, one sequence and one assignment at a time."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime.apply import simulated_formats
from runtime.units import list_weights
from sensitivity.evaluation import mean_interval, score_assignments
from tests.tiny_models import build_tiny_llama


def log_softmax_float64(logits: Tensor) -> np.ndarray:
    values = logits.numpy().astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    return np.asarray(values - np.log(np.exp(values).sum(axis=-1, keepdims=True)))


# 3 sequences of 200 tokens: the groups of sequences are 2 and 1.
@pytest.mark.parametrize(("sequences", "length"), [(3, 200), (5, 7), (2, 600)])
def test_scores(sequences: int, length: int) -> None:
    model = build_tiny_llama().requires_grad_(False)
    model.config.max_position_embeddings = 1024
    weights = list(list_weights(model))
    assignments = {
        "reference": {},
        "narrow": dict.fromkeys(weights, "int3_g64"),
        "one": {weights[3]: "int2_g64"},
    }
    tokens = torch.randint(320, (sequences, length), generator=torch.Generator().manual_seed(3))
    steps: list[tuple[int, int]] = []
    scores = score_assignments(model, assignments, tokens, progress=lambda done, total: steps.append((done, total)))
    assert list(scores) == list(assignments)
    assert steps == [(i, len(steps)) for i in range(1, len(steps) + 1)]
    for name, formats in assignments.items():
        for s in range(sequences):
            row = tokens[s : s + 1]
            with torch.no_grad():
                log_p = log_softmax_float64(model(row).logits[0])
                with simulated_formats(model, formats):
                    log_q = log_softmax_float64(model(row).logits[0])
            kl = float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())
            nll = -float(log_q[np.arange(length - 1), row[0, 1:].numpy()].mean())
            # Sums over 320 float32 terms of logits that a batch may round otherwise.
            assert scores[name].kl[s] == pytest.approx(kl, rel=1e-4, abs=2e-6)
            assert scores[name].nll[s] == pytest.approx(nll, rel=1e-6)
    assert not scores["reference"].kl.any()
    assert min(scores["narrow"].kl.min(), scores["one"].kl.min()) > 1e-3


def test_interval_is_that_of_the_t_distribution() -> None:
    # Four values: mean 5, standard deviation 2.5819889, and 3.1824463 the 97.5 % point of t with 3 degrees of freedom.
    mean, low, high = mean_interval(np.array([2.0, 4.0, 6.0, 8.0]))
    half = 3.1824463052842638 * math.sqrt(20 / 3) / 2
    assert (mean, low, high) == pytest.approx((5.0, 5.0 - half, 5.0 + half), rel=1e-12)


def test_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        _, low, high = mean_interval(rng.normal(3.0, 1.0, size=5), level=0.8)
        covered += low <= 3.0 <= high
    # 1600 expected, standard deviation 18.
    assert abs(covered - 1600) < 90
