"""Activation-aware scales leave less output error after rounding than none."""

import pytest
import torch

from runtime.formats import find_format
from runtime.quantization import dequantize
from runtime.quantizers import InputStatistics, find_activation_scale
from runtime.quantizers.rtn import quantize_rtn
from runtime.transforms.aware_scaling import find_aware_scales
from runtime.transforms.observation import observe_second_moments
from runtime.transforms.scale_folding import fold_scales_, list_scale_sites
from tests.runtime.transforms.decoders import TOKENS, build_float64
from tests.tiny_models import build_tiny_llama

FORMAT = "int3_g32"


def measure_errors(model: torch.nn.Module) -> dict[str, float]:
    """Returns site name -> output error of all its readers rounded to nearest, from inputs observed on the model."""
    sites = list_scale_sites(model)
    moments, _ = observe_second_moments(model, TOKENS, {site.name: site.observed for site in sites})
    errors = {}
    for site in sites:
        rows = torch.cat([reader.reshape(-1, reader.shape[-1]) for reader in site.readers]).float()
        difference = (dequantize(quantize_rtn(rows, find_format(FORMAT))) - rows).double()
        errors[site.name] = float(((difference @ moments[site.name]) * difference).sum())
    return errors


@pytest.mark.parametrize("name", ["llama, no shared heads", "mixtral", "qwen2 mixture"])
def test_no_norm_site_gets_worse(name: str) -> None:
    """The exponent 0, no scale at all, is among those searched. (Value heads change rows that norms' readers hold.)"""
    model = build_float64(name)
    before = measure_errors(model)
    factors = find_aware_scales(model, TOKENS, format=FORMAT)
    assert any(bool((factor != 1).any()) for factor in factors.values())
    chosen = {key: factor for key, factor in factors.items() if key.endswith("layernorm")}
    fold_scales_(model, chosen)
    after = measure_errors(model)
    for key in chosen:
        # The search sums in float32: 64 columns of up to 1,100 rows, both moments and errors.
        assert after[key] <= before[key] * (1 + 1e-3)
    assert sum(after[key] for key in chosen) < sum(before[key] for key in chosen)


def test_one_reader_gets_the_scale_of_its_own_search() -> None:
    model = build_tiny_llama(key_value_heads=4)
    linear = model.model.layers[1].self_attn.o_proj
    moments, counts = observe_second_moments(model, TOKENS, {"o": linear})
    statistics = InputStatistics(second_moment=moments["o"].float(), count=counts["o"])
    expected = find_activation_scale(linear.weight.detach(), find_format(FORMAT), statistics).scale
    factor = find_aware_scales(model, TOKENS, format=FORMAT)["model.layers.1.self_attn.v_proj"]
    assert torch.allclose(factor, 1 / expected.double(), rtol=1e-6)


def test_shared_heads_get_the_scale_of_their_copies() -> None:
    """Two query heads of each value head: their columns are rows of one weight, their mean moments one moment."""
    model = build_tiny_llama(key_value_heads=2).requires_grad_(False)
    linear = model.model.layers[0].self_attn.o_proj  # query heads 0, 1 read value head 0; 2, 3 read 1
    moments, counts = observe_second_moments(model, TOKENS, {"o": linear})
    heads = [torch.arange(16) + 16 * h for h in range(4)]
    copies = [torch.cat([heads[0], heads[2]]), torch.cat([heads[1], heads[3]])]
    rows = torch.stack([linear.weight[:, columns] for columns in copies], dim=1).reshape(-1, 32)
    moment = torch.stack([moments["o"][columns][:, columns] for columns in copies]).mean(dim=0)
    statistics = InputStatistics(second_moment=moment.float(), count=counts["o"])
    expected = find_activation_scale(rows, find_format(FORMAT), statistics).scale
    factor = find_aware_scales(model, TOKENS, format=FORMAT)["model.layers.0.self_attn.v_proj"]
    assert torch.allclose(factor, 1 / expected.double(), rtol=1e-6)


def test_steps_are_checked() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1: got steps=0"):
        find_aware_scales(build_tiny_llama(), TOKENS, steps=0)


def test_format_is_checked() -> None:
    with pytest.raises(ValueError, match="format must be an integer format: got 'bf16'"):
        find_aware_scales(build_tiny_llama(), TOKENS, format="bf16")


def test_groups_must_divide_every_site() -> None:
    match = r"group_size must divide the channels of every site: got group_size=64, 32 channels of '.*v_proj'"
    with pytest.raises(ValueError, match=match):
        find_aware_scales(build_tiny_llama(), TOKENS)
