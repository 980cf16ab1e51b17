"""Exponent biases move between activations and weights without touching a mantissa."""

import math

import pytest
import torch

from runtime.transforms.exponent_bias import find_exponent_biases
from runtime.transforms.scale_folding import fold_scales_, list_scale_sites
from runtime.transforms.smoothing import measure_largest_inputs
from tests.runtime.transforms.decoders import DECODERS, TOKENS, compute_logits
from tests.tiny_models import build_tiny_llama


@pytest.mark.parametrize("decoder", DECODERS)
def test_logits_stay_to_the_bit(decoder: str) -> None:
    model = DECODERS[decoder]()
    logits = compute_logits(model)
    factors = find_exponent_biases(model, TOKENS)
    assert any(bool((factor != 1).any()) for factor in factors.values())
    fold_scales_(model, factors)
    assert torch.equal(compute_logits(model), logits)


def test_weights_of_bfloat16_stay_exact() -> None:
    model = build_tiny_llama().bfloat16().float()
    fold_scales_(model, find_exponent_biases(model, TOKENS))
    assert all(torch.equal(weight.bfloat16().float(), weight) for weight in model.state_dict().values())


@pytest.mark.parametrize(("exponent_bits", "mantissa_bits"), [(1, 2), (2, 1), (3, 0), (5, 10)])
def test_shifts_are_those_of_the_formula(exponent_bits: int, mantissa_bits: int) -> None:
    model = build_tiny_llama().requires_grad_(False)
    model.model.layers[0].input_layernorm.weight.mul_(torch.logspace(0, -3, 64))
    found = find_exponent_biases(model, TOKENS, exponent_bits=exponent_bits, mantissa_bits=mantissa_bits)
    for name, largest in measure_largest_inputs(model, TOKENS, list_scale_sites(model)).items():
        biases = [
            round(2**exponent_bits - math.log2(x) + math.log2(2 - 2**-mantissa_bits) - 1) for x in largest.tolist()
        ]
        least = min(biases)
        shifts = [min(max(b, least), least + 2**exponent_bits - 1) - least for b in biases]
        assert found[name].tolist() == [2.0**k for k in shifts]


def test_channels_of_zeros_stay() -> None:
    model = build_tiny_llama().requires_grad_(False)
    model.model.layers[0].input_layernorm.weight[7] = 0.0
    factor = find_exponent_biases(model, TOKENS)["model.layers.0.input_layernorm"]
    assert factor[7] == 1.0 and bool(torch.isfinite(factor).all())


@pytest.mark.parametrize(("exponent_bits", "mantissa_bits"), [(0, 1), (6, 1), (2, -1), (2, 11)])
def test_options_are_checked(exponent_bits: int, mantissa_bits: int) -> None:
    with pytest.raises(ValueError, match="exponent_bits must be 1 to 5 and mantissa_bits 0 to 10: got exponent_bits="):
        find_exponent_biases(build_tiny_llama(), TOKENS, exponent_bits=exponent_bits, mantissa_bits=mantissa_bits)
