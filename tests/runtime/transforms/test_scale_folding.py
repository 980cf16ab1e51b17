"""Folding of any positive factors keeps the function, and touches what writes and what reads a channel."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from runtime.transforms.scale_folding import ScaleSite, fold_scales_, largest_columns, list_scale_sites
from tests.runtime.transforms.decoders import DECODERS, FLOAT64_TOLERANCE, build_float64, compute_logits
from tests.tiny_models import build_tiny_llama

LOGITS = {name: compute_logits(build_float64(name)) for name in ("llama, tied", "qwen2, odd widths", "qwen2 mixture")}


def draw(site: ScaleSite, seed: int, spread: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(spread * torch.randn(site.channels, generator=generator, dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(sorted(LOGITS)),
    index=st.integers(0, 10**6),
    seed=st.integers(0, 10**6),
    spread=st.floats(0, 3),
)
def test_any_site_keeps_the_logits(name: str, index: int, seed: int, spread: float) -> None:
    model = build_float64(name)
    sites = list_scale_sites(model)
    site = sites[index % len(sites)]
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    fold_scales_(model, {site.name: draw(site, seed, spread)})
    assert (compute_logits(model) - LOGITS[name]).abs().max() <= FLOAT64_TOLERANCE
    touched = {id(tensor) for tensor in (*site.writers, *site.readers)}
    for key, parameter in model.named_parameters():
        assert id(parameter) in touched or torch.equal(parameter, before[key])


def test_powers_of_two_keep_every_bit() -> None:
    """A float times a power of two keeps its mantissa, and so do products and sums of it."""
    for name in ("llama, biases and one value head", "mixtral"):
        model = DECODERS[name]()
        logits = compute_logits(model)
        generator = torch.Generator().manual_seed(1)
        factors = {
            site.name: 2.0 ** torch.randint(-6, 7, (site.channels,), generator=generator).double()
            for site in list_scale_sites(model)
        }
        fold_scales_(model, factors)
        assert torch.equal(compute_logits(model), logits)


def test_sites_of_a_block() -> None:
    names = [site.name.removeprefix("model.layers.0.") for site in list_scale_sites(build_tiny_llama())[:4]]
    assert names == ["input_layernorm", "post_attention_layernorm", "mlp.up_proj", "self_attn.v_proj"]
    mixture = [site.name for site in list_scale_sites(DECODERS["qwen2 mixture"]()) if ".0." in site.name]
    assert [name.removeprefix("model.layers.0.") for name in mixture] == [
        "input_layernorm",
        "post_attention_layernorm",
        "mlp.shared_expert.up_proj",
        "self_attn.v_proj",
    ]


def test_repeated_heads() -> None:
    """Two value heads of two channels, each read by three query heads."""
    weight = torch.zeros(4, 1)
    model = build_tiny_llama()
    site = ScaleSite(name="v", writers=(weight,), readers=(), observed=model, head_dim=2, repeats=3)
    wide = site.widen(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert wide.tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
    values = torch.tensor([1.0, 9, 7, 2, 3, 4, 0, 0, 5, 1, 2, 8])
    assert site.narrow_to_largest(values).tolist() == [7, 9, 5, 8]
    assert torch.equal(site.narrow_to_largest(wide), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert torch.allclose(site.narrow_to_mean(values), torch.tensor([11 / 3, 5, 7 / 3, 3]))
    assert torch.equal(site.narrow_to_mean(wide), torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_largest_columns_of_several_shapes() -> None:
    stack = torch.tensor([[[1.0, -5.0], [2.0, 0.0]], [[0.0, 1.0], [-3.0, 1.0]]])
    assert largest_columns([stack, torch.tensor([[2.5, -6.0]])]).tolist() == [3.0, 6.0]
