"""Rescaling changes the weights, not the function."""

import copy

import pytest
import torch
from transformers import PreTrainedModel

from runtime.transforms import apply_random_rescaling_
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama

TOKENS = torch.arange(40).remainder(VOCABULARY_SIZE).view(2, 20)

# A rescaled weight is rounded anew, by eps / 2 of its size, and every sum of the forward pass rounds up to
# 128 terms. Two blocks of some ten products each, logits below 8: 2 * 10 products * 128 terms * eps
# * 8, which is 5e-12. One forgotten scale moves the logits by 0.8 and more.
FLOAT64_TOLERANCE = 2 * 10 * 128 * torch.finfo(torch.float64).eps * 8


def compute_logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("key_value_heads", [4, 2, 1], ids=["one_per_head", "two_groups", "one_group"])
@pytest.mark.parametrize("attention_bias", [False, True], ids=["no_bias", "bias"])
def test_logits_stay_and_weights_change(key_value_heads: int, attention_bias: bool) -> None:
    model = build_tiny_llama(key_value_heads=key_value_heads, attention_bias=attention_bias).double()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    logits = compute_logits(model)
    apply_random_rescaling_(model)
    assert (compute_logits(model) - logits).abs().max() <= FLOAT64_TOLERANCE
    rescaled = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    unscaled_biases = ("q_proj.bias", "k_proj.bias", "o_proj.bias", "gate_proj.bias", "down_proj.bias")
    assert rescaled == {name for name in before if ".layers." in name and not name.endswith(unscaled_biases)}


def test_scales_have_the_asked_spread() -> None:
    model = build_tiny_llama().double()
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    apply_random_rescaling_(model, sigma=0.5)
    # The logarithm of the ratio is that of a row's scale less that of a column's: its variance is 2 sigma^2.
    spread = (model.model.layers[0].mlp.up_proj.weight.detach() / before).log().std().item()
    # The deviation of n normal values has a relative standard error of 1 / sqrt(2 n): 0.06 and 0.09 for
    # 128 rows and 64 columns, 0.05 for both together. Five of them are allowed.
    assert spread == pytest.approx(0.5 * 2**0.5, rel=0.25)


def test_sigma_zero_changes_nothing() -> None:
    model = build_tiny_llama()
    before = copy.deepcopy(model.state_dict())
    apply_random_rescaling_(model, sigma=0.0)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_seed_decides_the_scales() -> None:
    first, again, other = build_tiny_llama(), build_tiny_llama(), build_tiny_llama()
    apply_random_rescaling_(first, seed=3)
    apply_random_rescaling_(again, seed=3)
    apply_random_rescaling_(other, seed=4)
    weights = [model.model.layers[1].mlp.down_proj.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_weights_keep_their_dtype_and_are_rounded_once() -> None:
    exact, rounded = build_tiny_llama().bfloat16().double(), build_tiny_llama().bfloat16()
    apply_random_rescaling_(exact)
    apply_random_rescaling_(rounded)
    for name, weight in rounded.state_dict().items():
        assert weight.dtype == torch.bfloat16
        # v_proj and up_proj are multiplied twice, by columns and by rows, so they round twice.
        if not name.endswith(("v_proj.weight", "up_proj.weight")):
            assert torch.equal(weight, exact.state_dict()[name].bfloat16()), name


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf")])
def test_sigma_is_checked(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma must be a finite number >= 0: got sigma="):
        apply_random_rescaling_(build_tiny_llama(), sigma=sigma)
