"""Equalization needs no text, finds the least of its error in closed form, and undoes a rescaling of channels."""

from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.drawn_tokens import draw_tokens
from runtime.formats import find_format
from runtime.quantization import dequantize
from runtime.quantizers.rtn import quantize_rtn
from runtime.transforms import apply_random_rescaling_, apply_transforms_, parse_transform
from runtime.transforms.equalization import find_equalization
from runtime.transforms.observation import observe_powers, observe_second_moments
from runtime.transforms.scale_folding import ScaleSite, fold_scales_, list_scale_sites
from tests.runtime.transforms.decoders import DECODERS, FLOAT64_TOLERANCE, TOKENS, build_float64, compute_logits
from tests.tiny_models import build_tiny_llama

FORMAT = "int4_g32"


def read_site(model: Any, end: str) -> tuple[ScaleSite, Tensor, Tensor]:
    """Returns the first site of a name that ends so, its readers' rows [N, C], and its channels' drawn powers [C]."""
    site = next(site for site in list_scale_sites(model) if site.name.endswith(end))
    rows = torch.cat([reader.detach().reshape(-1, reader.shape[-1]) for reader in site.readers])
    return site, rows, observe_powers(model, draw_tokens(model), {"site": site.observed})["site"]


def measure_errors(model: Any) -> Tensor:
    """Returns the output error of every site's readers rounded to nearest, on the drawn tokens, over its own size."""
    sites, errors = list_scale_sites(model), []
    moments, _ = observe_second_moments(model, draw_tokens(model), {site.name: site.observed for site in sites})
    for site in sites:
        rows = torch.cat([reader.detach().reshape(-1, reader.shape[-1]) for reader in site.readers])
        difference = dequantize(quantize_rtn(rows.float(), find_format(FORMAT))).double() - rows
        moment = moments[site.name]
        errors.append(((difference @ moment) * difference).sum() / ((rows @ moment) * rows).sum())
    return torch.stack(errors)


@pytest.mark.parametrize("name", DECODERS)
def test_function_stays_without_any_text(name: str) -> None:
    model = build_float64(name)
    before = compute_logits(model)
    tensors = apply_transforms_(model, [parse_transform("equalize:sequences=4")])
    assert any(bool((factor != 1).any()) for factor in tensors.values())
    assert float((compute_logits(model) - before).abs().max()) <= FLOAT64_TOLERANCE


def test_text_is_not_read() -> None:
    model = build_float64("llama")
    blind, given = (find_equalization(model, tokens, sequences=2) for tokens in (None, TOKENS))
    assert blind.keys() == given.keys() == {site.name for site in list_scale_sites(model)}
    assert all(torch.equal(blind[name], given[name]) for name in blind)


@pytest.mark.parametrize("end", ["input_layernorm", "mlp.up_proj"])
def test_halves_are_the_least_of_the_formula(end: str) -> None:
    """(sum w^2 s^2)(sum m^2 / s^2) >= (sum m w)^2, and equal at s: no other scale has less."""
    model = build_float64("llama")
    site, rows, power = read_site(model, end)
    columns = rows.square().sum(dim=0)
    scale = 1 / find_equalization(model, None, inputs=0.5, weights=0.5)[site.name]
    found = (columns * scale**2).sum() * (power / scale**2).sum()
    assert float(found) == pytest.approx(float((columns * power).sqrt().sum() ** 2), rel=1e-12)


def test_random_rescaling_is_undone() -> None:
    """Exponents that add up to 1: both models end at the same weights, so they round with the same error."""
    plain, rescaled = build_float64("llama, no shared heads"), build_float64("llama, no shared heads")
    apply_random_rescaling_(rescaled, sigma=0.7, seed=1)
    before, spoiled = measure_errors(plain), measure_errors(rescaled)
    assert float(spoiled.mean()) > 1.2 * float(before.mean())
    for model in (plain, rescaled):
        fold_scales_(model, find_equalization(model, None, inputs=0.5, weights=0.5))
    # Up to one factor for all channels of a site, which changes the float16 scales of the groups by 2^-11 at most, so
    # that a weight may fall to the other side of a step: some part in a thousand of all weights.
    assert torch.allclose(measure_errors(plain), measure_errors(rescaled), rtol=0.02)
    for ours, theirs in zip(list_scale_sites(plain), list_scale_sites(rescaled), strict=True):
        ratio = torch.cat([(a / b).flatten() for a, b in zip(ours.readers, theirs.readers, strict=True)]).abs()
        # v_proj and up_proj are written by sites of their own, row by row.
        if ours.name.endswith(("up_proj", "v_proj")):
            assert float(ratio.std() / ratio.mean()) < 1e-9


def test_rescaled_layers_round_with_less_error() -> None:
    model = build_float64("llama, no shared heads")
    apply_random_rescaling_(model, sigma=0.7, seed=1)
    before = measure_errors(model)
    fold_scales_(model, find_equalization(model, None))
    assert float((measure_errors(model) / before).mean()) < 0.8


def test_geometric_mean_is_one_and_dead_channels_stay() -> None:
    model = build_tiny_llama().requires_grad_(False)
    model.model.layers[0].input_layernorm.weight[5] = 0.0
    for part in ("gate_proj", "up_proj"):
        getattr(model.model.layers[0].mlp, part).weight[:, 7] = 0.0
    factors = find_equalization(model, None, sequences=1)
    assert factors["model.layers.0.input_layernorm"][5] == 1.0
    assert factors["model.layers.0.post_attention_layernorm"][7] == 1.0
    assert all(float(factor.log().mean()) == pytest.approx(0.0, abs=1e-12) for factor in factors.values())


@pytest.mark.parametrize("option", ["inputs", "weights"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_exponents_are_checked(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"exponents must be between 0 and 1: got {option}="):
        find_equalization(build_tiny_llama(), None, **{option: value})
