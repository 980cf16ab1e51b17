"""The predicted noise against closed forms, and against measured noise where its model holds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from runtime.candidates import list_candidates
from runtime.units import find_units
from sensitivity.criteria.crest_factor import predict_grid_noise
from sensitivity.criteria.weight_error import (
    measure_weight_error,
    measure_weight_power,
    relative_error,
    signal_to_noise_db,
)
from tests.tiny_models import build_tiny_llama

FORMATS = ("int2_g64", "int3_g64_sym", "int4_g32", "int4_g32_sym", "int8_channel_sym", "bf16")


def one_weight(values: torch.Tensor) -> nn.Module:
    network = nn.Sequential(nn.Linear(values.shape[1], values.shape[0], bias=False))
    network[0].weight.data = values
    return network.requires_grad_(False)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([2, 3, 4, 5, 6, 8]), exponent=st.integers(-6, 6))
def test_one_symmetric_group_is_the_crest_factor(seed: int, bits: int, exponent: int) -> None:
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    network = one_weight(row)
    predicted = predict_grid_noise(network, list_candidates(find_units(network), (f"int{bits}_channel_sym",)))
    crest = float(row.abs().max() / row.double().square().mean().sqrt())
    assert predicted[0, 0] == pytest.approx(crest**2 / (3 * (2**bits - 1) ** 2), rel=1e-6)
    decibel = 10 * np.log10(3) + 20 * np.log10(2**bits - 1) - 20 * np.log10(crest)
    assert signal_to_noise_db(predicted)[0, 0] == pytest.approx(decibel, abs=1e-5)


def test_groups_are_summed_and_asymmetric_ranges_hold_zero() -> None:
    groups = [torch.linspace(*ends, 32) for ends in ((-1.0, 3.0), (2.0, 4.0), (-7.0, -5.0))]
    network = one_weight(torch.cat(groups).unsqueeze(0))
    candidates = list_candidates(find_units(network), ("int4_g32", "int4_g32_sym"))
    power = sum(float(group.square().sum()) for group in groups)
    asymmetric, symmetric = 32 * (4.0**2 + 4.0**2 + 7.0**2), 32 * (6.0**2 + 8.0**2 + 14.0**2)
    expected = np.array([[asymmetric, symmetric]]) / (12 * 15**2) / power
    np.testing.assert_allclose(predict_grid_noise(network, candidates), expected, rtol=1e-6)


def test_noise_of_weights_spread_evenly_is_as_predicted() -> None:
    values = torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    network = one_weight(values)
    candidates = list_candidates(find_units(network), ("int4_g64", "int4_channel_sym", "int6_g64", "int8_g64"))
    measured = relative_error(
        measure_weight_error(network, candidates), measure_weight_power(network, candidates.units)
    )
    # 16,384 errors of a uniform law: their mean square scatters by sqrt(4/5 / 16384) = 0.7 %. The two ends of a
    # group lie on the grid, 2 of 64 weights.
    np.testing.assert_allclose(predict_grid_noise(network, candidates), measured, rtol=0.08)


def test_scale_does_not_matter_and_refused_pairs_are_zero(model: PreTrainedModel) -> None:
    candidates = list_candidates(find_units(model), FORMATS)
    noise = predict_grid_noise(model, candidates)
    assert not noise[~candidates.allowed].any()
    assert (noise[candidates.allowed] > 0).all()
    for parameter in model.parameters():
        parameter.data = parameter.data * 4.0
    np.testing.assert_allclose(predict_grid_noise(model, candidates), noise, rtol=1e-9)


def test_floats_have_their_measured_noise() -> None:
    model = build_tiny_llama().requires_grad_(False)
    candidates = list_candidates(find_units(model), ("bf16", "fp16"))
    measured = relative_error(measure_weight_error(model, candidates), measure_weight_power(model, candidates.units))
    np.testing.assert_allclose(predict_grid_noise(model, candidates), measured, rtol=1e-12)


def test_fused_units_divide_their_noise_by_all_their_power() -> None:
    model = build_tiny_llama().requires_grad_(False)
    single = list_candidates(find_units(model), ("int4_g64",))
    fused = list_candidates(find_units(model, fuse=[r"self_attn\.(q|k|v)_proj"]), ("int4_g64",))
    parts = predict_grid_noise(model, single)[:, 0] * measure_weight_power(model, single.units)
    row_of = {unit.weights[0].name: u for u, unit in enumerate(single.units)}
    for unit, ratio in zip(fused.units, predict_grid_noise(model, fused)[:, 0], strict=True):
        noise = sum(parts[row_of[w.name]] for w in unit.weights)
        assert ratio == pytest.approx(noise / measure_weight_power(model, [unit])[0], rel=1e-12)


def test_formats_without_such_a_grid_have_their_measured_noise() -> None:
    network = one_weight(torch.randn(8, 128, generator=torch.Generator().manual_seed(0)))
    candidates = list_candidates(find_units(network), ("int4_g64_pow2", "int1_g64", "mxfp4", "q4_1", "fp4_channel"))
    power = measure_weight_power(network, candidates.units)
    measured = relative_error(measure_weight_error(network, candidates), power)
    np.testing.assert_allclose(predict_grid_noise(network, candidates), measured, rtol=1e-6)
