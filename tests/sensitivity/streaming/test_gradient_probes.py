"""Hutchinson's probe on known quadratics; gradients handed on, against plain autograd; the model left as it was."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtime.candidates import list_candidates
from runtime.units import Weight, find_units
from sensitivity.streaming.gradient_probes import RademacherProbe, received_gradients, text_loss
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral

TOKENS = torch.randint(2, VOCABULARY_SIZE, (2, 8), generator=torch.Generator().manual_seed(0))


def make_quadratic(seed: int = 0) -> tuple[dict[str, nn.Parameter], Tensor]:
    """Returns parameters of 3 x 2 and 4 numbers, and a symmetric Hessian [10, 10] of both together."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(10, 10, dtype=torch.float64, generator=generator)
    parameters = {
        "first": nn.Parameter(torch.randn(3, 2, dtype=torch.float64, generator=generator)),
        "second": nn.Parameter(torch.randn(4, dtype=torch.float64, generator=generator)),
    }
    return parameters, half + half.T


def quadratic(parameters: dict[str, nn.Parameter], H: Tensor) -> Tensor:
    x = torch.cat([parameters["first"].flatten(), parameters["second"]])
    return 0.5 * x @ H @ x


def sample_traces(parameters: dict[str, nn.Parameter], H: Tensor, index: int) -> dict[str, float]:
    probe = RademacherProbe(parameters, seed=3, index=index)
    for parameter in parameters.values():
        parameter.grad = None
    probe.backward(quadratic(parameters, H))
    return {name: float((probe.signs(name) * p.grad).sum()) for name, p in parameters.items() if p.grad is not None}


def test_hessian_times_signs() -> None:
    parameters, H = make_quadratic()
    probe = RademacherProbe(parameters, seed=3, index=0)
    probe.backward(quadratic(parameters, H))
    z = torch.cat([probe.signs("first").flatten(), probe.signs("second")])
    assert set(z.tolist()) == {-1.0, 1.0}
    gradients = [parameter.grad for parameter in parameters.values()]
    product = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
    torch.testing.assert_close(product, H @ z, rtol=1e-12, atol=1e-12)


def test_diagonal_hessian_needs_one_probe() -> None:
    parameters, H = make_quadratic()
    traces = sample_traces(parameters, torch.diag(torch.diag(H)), 0)
    assert traces["first"] == pytest.approx(float(torch.diag(H)[:6].sum()), rel=1e-12)
    assert traces["second"] == pytest.approx(float(torch.diag(H)[6:].sum()), rel=1e-12)


def test_mean_of_probes_is_the_trace_of_each_block() -> None:
    parameters, H = make_quadratic()
    count = 2000
    samples = [sample_traces(parameters, H, index) for index in range(count)]
    for name, block in (("first", slice(6)), ("second", slice(6, 10))):
        values = np.array([sample[name] for sample in samples])
        # z_b'(H z)_b is the trace plus each H_ij z_i z_j: entries within the block twice over, others once.
        inside = H[block, block].square().sum() - torch.diag(H)[block].square().sum()
        outside = H[block].square().sum() - H[block, block].square().sum()
        deviation = float((2 * inside + outside).sqrt())
        assert values.std() == pytest.approx(deviation, rel=5 / np.sqrt(count))
        trace = float(torch.diag(H)[block].sum())
        assert values.mean() == pytest.approx(trace, abs=4 * deviation / np.sqrt(count))


def test_signs_depend_on_seed_index_and_name_alone() -> None:
    parameters, _ = make_quadratic()
    probe = RademacherProbe(parameters, seed=3, index=5)
    first, second = probe.signs("first").clone(), probe.signs("second").clone()
    torch.testing.assert_close(probe.signs("first"), first, rtol=0, atol=0)
    again = RademacherProbe(dict(reversed(parameters.items())), seed=3, index=5)
    torch.testing.assert_close(again.signs("second"), second, rtol=0, atol=0)
    wide = {"wide": nn.Parameter(torch.zeros(64))}
    drawn = {
        tuple(RademacherProbe(wide, seed=seed, index=index).signs("wide").tolist())
        for seed in (0, -1, 20_240_101_123_045)
        for index in range(3)
    }
    assert len(drawn) == 9


def test_linear_loss_adds_nothing() -> None:
    parameters, _ = make_quadratic()
    probe = RademacherProbe(parameters, seed=0, index=0)
    probe.backward(parameters["first"].sum())
    assert all(parameter.grad is None for parameter in parameters.values())


def test_text_loss_is_the_cross_entropy_of_the_next_tokens() -> None:
    model = build_tiny_llama().requires_grad_(False)
    log_p = torch.log_softmax(model(TOKENS[:1]).logits[0].double(), -1)
    expected = -sum(log_p[t, TOKENS[0, t + 1]] for t in range(7)) / 7
    assert float(text_loss(model, TOKENS[:1])) == pytest.approx(float(expected), rel=1e-6)


def test_gradients_are_handed_on_once_and_not_kept(model: PreTrainedModel) -> None:
    candidates = list_candidates(find_units(model), ("int4_g64",))
    received: dict[str, tuple[int, Tensor]] = {}

    def receive(u: int, weight: Weight, values: Tensor, gradient: Tensor) -> None:
        assert weight.name not in received
        assert values.shape == gradient.shape == weight.shape
        received[weight.name] = u, gradient.clone()

    with received_gradients(model, candidates, receive), torch.enable_grad():
        torch.autograd.backward(text_loss(model, TOKENS[:1]))
        assert all(parameter.grad is None for parameter in model.parameters())
    plain = copy.deepcopy(model).requires_grad_(True)
    for module in plain.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    torch.autograd.backward(text_loss(plain, TOKENS[:1]))
    assert set(received) == {weight.name for unit in candidates.units for weight in unit.weights}
    for u, unit in enumerate(candidates.units):
        for weight in unit.weights:
            gradient = plain.get_parameter(weight.parameter).grad
            assert gradient is not None
            if weight.expert_index is not None:
                gradient = gradient[weight.expert_index]
            assert received[weight.name][0] == u
            # The same sums in other places of the memory.
            torch.testing.assert_close(received[weight.name][1], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trainable"])
def test_model_is_left_as_it_was(trained: bool) -> None:
    model = build_tiny_mixtral().requires_grad_(trained)
    candidates = list_candidates(find_units(model), ("int4_g64",))
    padding = model.model.embed_tokens.padding_idx
    with pytest.raises(KeyboardInterrupt), received_gradients(model, candidates, lambda *_: None):
        assert model.model.embed_tokens.padding_idx is None
        assert not model.model.norm.weight.requires_grad
        raise KeyboardInterrupt
    assert model.model.embed_tokens.padding_idx == padding == 1
    assert all(parameter.requires_grad is trained for parameter in model.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
