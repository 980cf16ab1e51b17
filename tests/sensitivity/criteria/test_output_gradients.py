"""What is handed on of every product: its input and the gradient of its output; their product is the weight's own."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from runtime.candidates import list_candidates
from runtime.units import Weight, find_units
from sensitivity.criteria.output_gradients import received_output_gradients
from sensitivity.streaming.gradient_probes import text_loss
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_mixtral

TOKENS = torch.randint(2, VOCABULARY_SIZE, (1, 9), generator=torch.Generator().manual_seed(0))


def test_inputs_times_gradients_are_the_weights_gradients(model: PreTrainedModel) -> None:
    candidates = list_candidates(find_units(model), ("int4_g64",))
    sums: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def receive(u: int, weight: Weight, x: Tensor, gradient: Tensor) -> None:
        assert candidates.units[u].weights == (weight,)
        total = sums.setdefault(weight.name, torch.zeros(weight.shape))
        calls[weight.name] = calls.get(weight.name, 0) + 1
        total += gradient.T @ x if x.is_floating_point() else torch.zeros_like(total).index_add_(0, x, gradient)

    with received_output_gradients(model, candidates, receive):
        torch.autograd.backward(text_loss(model, TOKENS))
    plain = copy.deepcopy(model).requires_grad_(True)
    torch.autograd.backward(text_loss(plain, TOKENS))
    for unit in candidates.units:
        [weight] = unit.weights
        gradient = plain.get_parameter(weight.parameter).grad
        assert gradient is not None
        expected = gradient if weight.expert_index is None else gradient[weight.expert_index]
        if weight.name not in sums:
            # An expert that no token visits.
            assert unit.kind == "expert" and not expected.any()
            continue
        # float32 sums in another order.
        torch.testing.assert_close(sums[weight.name], expected, rtol=1e-3, atol=1e-6)
        # A tied weight is read at both ends of the model.
        assert calls[weight.name] == (2 if weight.aliases else 1)
    assert len(sums) > 0.8 * len(candidates.units)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trainable"])
def test_no_weight_takes_a_gradient_and_the_model_is_left_as_it_was(trained: bool) -> None:
    model = build_tiny_mixtral().requires_grad_(trained)
    experts = model.config._experts_implementation
    candidates = list_candidates(find_units(model), ("int4_g64",))
    with torch.no_grad(), received_output_gradients(model, candidates, lambda *_: None):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        torch.autograd.backward(text_loss(model, TOKENS))
    assert all(parameter.grad is None and parameter.requires_grad is trained for parameter in model.parameters())
    with pytest.raises(KeyboardInterrupt), received_output_gradients(model, candidates, lambda *_: None):
        raise KeyboardInterrupt
    assert all(parameter.requires_grad is trained for parameter in model.parameters())
    assert model.config._experts_implementation == experts != "eager"
