"""The weight error against float64."""

import numpy as np
import torch
from transformers import PreTrainedModel

from runtime.candidates import list_candidates
from runtime.rendering import render
from runtime.units import find_units, read_weight
from sensitivity.criteria.weight_error import (
    measure_weight_error,
    measure_weight_power,
    relative_error,
    signal_to_noise_db,
)
from tests.tiny_models import build_tiny_llama

FORMATS = ("int2_g64", "int4_g32_sym", "int4_g128", "bf16")


def test_error_is_the_squared_norm(model: PreTrainedModel) -> None:
    candidates = list_candidates(find_units(model, fuse=[r"self_attn\.(q|k|v)_proj"]), FORMATS)
    error = measure_weight_error(model, candidates)
    assert error.dtype == np.float64
    # A group of 128 does not divide rows of 64, and embeddings take no 2 bits.
    assert 0 < (~candidates.allowed).sum() < candidates.allowed.sum()
    for (u, f), measured in np.ndenumerate(error):
        weights = [read_weight(model, weight) for weight in candidates.units[u].weights]
        exact = sum(
            float((render(values, candidates.formats[f]).double() - values.double()).square().sum())
            for values in weights
            if candidates.allowed[u, f]
        )
        # n positive float32 terms, each from a rounded difference and a rounded square.
        count = max(values.numel() for values in weights)
        assert abs(measured - exact) <= (count + 4) * torch.finfo(torch.float32).eps * exact
    assert np.all(error[candidates.allowed] > 0)


def test_weights_that_a_format_holds_exactly_have_no_error() -> None:
    model = build_tiny_llama().bfloat16().float().requires_grad_(False)
    candidates = list_candidates(find_units(model), ("int4_g64", "bf16"))
    error = measure_weight_error(model, candidates)
    assert not error[:, 1].any() and error[:, 0].all()


def test_relative_error_is_noise_over_signal() -> None:
    model = build_tiny_llama().requires_grad_(False)
    candidates = list_candidates(find_units(model), FORMATS)
    error, power = measure_weight_error(model, candidates), measure_weight_power(model, candidates.units)
    exact = [float(read_weight(model, unit.weights[0]).double().square().sum()) for unit in candidates.units]
    np.testing.assert_allclose(power, exact, rtol=1e-5)
    ratio = relative_error(error, power)
    np.testing.assert_allclose(ratio * power[:, None], error, rtol=1e-12)
    for parameter in model.parameters():
        parameter.data = parameter.data * 8.0  # a power of two changes no rounding, but of scales below 2^-14
    scaled = measure_weight_error(model, candidates)
    np.testing.assert_allclose(scaled, 64.0 * error, rtol=1e-3)
    np.testing.assert_allclose(relative_error(scaled, 64.0 * power), ratio, rtol=1e-3)


def test_weights_that_are_all_zero_have_no_relative_error() -> None:
    assert relative_error(np.zeros((1, 2)), np.zeros(1)).tolist() == [[0.0, 0.0]]


def test_ratio_in_decibel() -> None:
    np.testing.assert_allclose(signal_to_noise_db(np.array([1.0, 0.1, 0.001, 0.0])), [0.0, 10.0, 30.0, np.inf])
