"""Smoothing divides the difficulty as its exponent says."""

import pytest
import torch

from runtime.transforms.scale_folding import fold_scales_, largest_columns, list_scale_sites
from runtime.transforms.smoothing import find_smoothing, measure_largest_inputs
from tests.runtime.transforms.decoders import TOKENS, build_float64
from tests.tiny_models import build_tiny_llama


@pytest.mark.parametrize("name", ["llama", "qwen2, odd widths", "mixtral", "qwen2 mixture"])
def test_half_makes_channels_and_their_columns_equally_large(name: str) -> None:
    """max|X| / s = sqrt(max|X| max|W|) = s max|W|, up to the factor that all channels of a site share."""
    model = build_float64(name)
    factors = find_smoothing(model, TOKENS, alpha=0.5, sites="norms")
    fold_scales_(model, factors)
    sites = [site for site in list_scale_sites(model) if site.name in factors]
    assert len(sites) == 4
    largest = measure_largest_inputs(model, TOKENS, sites)
    for site in sites:
        ratio = largest[site.name] / largest_columns(site.readers)
        assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-9)


def test_one_makes_all_channels_equally_large() -> None:
    model = build_float64("llama")
    fold_scales_(model, find_smoothing(model, TOKENS, alpha=1.0))
    for largest in measure_largest_inputs(model, TOKENS, list_scale_sites(model)).values():
        assert torch.allclose(largest, largest[0].expand_as(largest), rtol=1e-9)


def test_zero_makes_all_columns_equally_large() -> None:
    model = build_float64("llama, no shared heads")
    fold_scales_(model, find_smoothing(model, TOKENS, alpha=0.0, sites="norms"))
    for site in list_scale_sites(model):
        if site.name.endswith("layernorm"):
            columns = largest_columns(site.readers)
            assert torch.allclose(columns, columns[0].expand_as(columns), rtol=1e-9)


def test_geometric_mean_is_one_and_dead_channels_stay() -> None:
    model = build_tiny_llama().requires_grad_(False)
    model.model.layers[0].input_layernorm.weight[5] = 0.0
    factor = find_smoothing(model, TOKENS)["model.layers.0.input_layernorm"]
    assert factor[5] == 1.0
    assert float(factor.log().mean()) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_is_checked(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be between 0 and 1: got alpha="):
        find_smoothing(build_tiny_llama(), TOKENS, alpha=alpha)


def test_sites_are_checked() -> None:
    with pytest.raises(ValueError, match="sites must be one of all, norms: got 'heads'"):
        find_smoothing(build_tiny_llama(), TOKENS, sites="heads")
