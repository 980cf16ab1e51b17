"""KL of joint changes against whole passes of changed copies, from every layer, with a cache that follows."""

import copy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from runtime.apply import simulated_formats
from runtime.candidates import Candidates, list_candidates
from runtime.units import find_units
from sensitivity.sketches.joint_kl import JointKL, kl_by_position
from tests.sensitivity.changed_models import joint_kl, kl_bound
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama

TOKENS = torch.randint(2, VOCABULARY_SIZE, (3, 8), generator=torch.Generator().manual_seed(0))
LARGEST_LOG_P = 12.0  # of the tiny models: the least likely of 320 tokens


def formats_of(candidates: Candidates, u: int, f: int) -> dict[str, str]:
    return {weight.name: candidates.formats[f].name for weight in candidates.units[u].weights}


def assert_near(kl: NDArray[np.float64], exact: NDArray[np.float64]) -> None:
    assert kl.dtype == np.float64 and kl.shape == (len(TOKENS),)
    assert np.all(np.abs(kl - exact) <= kl_bound(exact, LARGEST_LOG_P, VOCABULARY_SIZE))


def test_every_unit_alone(model: PreTrainedModel) -> None:
    candidates = list_candidates(find_units(model), ("int4_g64",))
    measurer = JointKL(model, TOKENS)
    assert -torch.log_softmax(model(TOKENS).logits, -1).min() < LARGEST_LOG_P
    for u, unit in enumerate(candidates.units):
        with simulated_formats(model, formats_of(candidates, u, 0)):
            kl = measurer.measure(unit.layer_index)
        assert_near(kl, joint_kl(model, candidates, {u: 0}, TOKENS))


def test_cache_follows_a_walk_in_any_order(model: PreTrainedModel) -> None:
    candidates = list_candidates(find_units(model), ("int3_g64", "int4_g64"), embedding_formats=("int4_g64",))
    order = np.random.default_rng(1).permutation(len(candidates.units)).tolist()
    measurer = JointKL(model, TOKENS)
    reference = copy.deepcopy(model)
    changed: dict[int, int] = {}

    def walk(rest: list[int]) -> None:
        if rest:
            u = rest[0]
            changed[u] = 1
            with simulated_formats(model, formats_of(candidates, u, 1)):
                kl = measurer.follow(candidates.units[u].layer_index)
                assert_near(kl, joint_kl(reference, candidates, changed, TOKENS))
                walk(rest[1:])

    with measurer.branch():
        walk(order)
    # The branch is over: a unit of the last layer runs against the reference's outputs again.
    last = max(u for u, unit in enumerate(candidates.units) if unit.layer_index == 1)
    with simulated_formats(model, formats_of(candidates, last, 1)):
        kl = measurer.measure(1)
    assert_near(kl, joint_kl(model, candidates, {last: 1}, TOKENS))


def test_followed_layers_are_run_once_only() -> None:
    model = build_tiny_llama().requires_grad_(False)
    measurer = JointKL(model, TOKENS)
    runs: list[int] = []
    for k, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, k=k: runs.append(k))
    measurer.follow(0)
    measurer.follow(1)
    measurer.measure(1)
    measurer.measure(None)
    assert runs == [0, 1, 1, 1, 0, 1]


def test_failure_leaves_the_cache_and_the_model() -> None:
    model = build_tiny_llama().requires_grad_(False)
    measurer = JointKL(model, TOKENS)
    weight = model.model.layers[1].mlp.down_proj.weight
    saved = weight.data
    weight.data = torch.zeros(3, 5)
    with pytest.raises(RuntimeError):
        measurer.follow(0)
    weight.data = saved
    assert not any(layer._forward_hooks for layer in model.model.layers)
    assert not measurer.measure(1).any()


def test_change_beyond_the_range_of_the_exponential() -> None:
    log_p = torch.log_softmax(torch.tensor([[0.0, 100.0, 1.0], [1.0, 2.0, 3.0]]), -1)
    logits = torch.tensor([[100.0, 0.0, 1.0], [1.0, 2.0, 3.5]])
    kl = kl_by_position(log_p, log_p.exp(), logits)
    log_q = torch.log_softmax(logits.double(), -1)
    exact = (log_p.double().exp() * (log_p.double() - log_q)).sum(-1)
    # Logarithms of the size of 100 have float32 errors of 100 eps, and there are a handful of them.
    torch.testing.assert_close(kl.double(), exact, rtol=0, atol=1000 * torch.finfo(torch.float32).eps)
    assert exact[0] > 99


def test_one_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 2 sequences .*got 1\. Cut the text"):
        JointKL(build_tiny_llama(), TOKENS[:1])
