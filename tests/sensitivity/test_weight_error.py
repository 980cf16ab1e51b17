"""The weight error against float64."""

import numpy as np
import torch
from transformers import PreTrainedModel

from runtime.candidates import list_candidates
from runtime.quantizers import render
from runtime.units import find_units, read_weight
from sensitivity.weight_error import measure_weight_error
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
