"""The table: every transform keeps the logits of every decoder it knows, names with options, and what is refused."""

import pytest
import torch

from runtime.transforms import TRANSFORMS, apply_transforms_, fingerprint_transforms, parse_transform
from tests.runtime.transforms.decoders import (
    DECODERS,
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    REFUSED,
    TOKENS,
    build_float64,
    compute_logits,
)
from tests.tiny_models import build_tiny_llama

NAMES = [name if name != "awq" else "awq:format=int4_channel:steps=4" for name in TRANSFORMS]
SEQUENCES = (
    "smoothquant,hadamard,head_hadamard",
    "hadamard,smoothquant",
    "untie,pca",
    "hadamard,untie,pca,exponent_bias",
)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", [*NAMES, *SEQUENCES])
def test_logits_stay_in_float64(name: str, decoder: str) -> None:
    model = build_float64(decoder)
    logits = compute_logits(model)
    apply_transforms_(model, [parse_transform(part) for part in name.split(",")], TOKENS)
    assert (compute_logits(model) - logits).abs().max() <= FLOAT64_TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_logits_stay_in_float32_and_weights_change(name: str) -> None:
    model = DECODERS["llama, tied"]()
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    logits = compute_logits(model)
    apply_transforms_(model, [parse_transform(name)], TOKENS)
    assert (compute_logits(model) - logits).abs().max() <= FLOAT32_TOLERANCE
    after = model.state_dict()
    changed = {key for key in before if key not in after or not torch.equal(after[key], before[key])}
    assert bool(changed) == (name != "untie")


@pytest.mark.parametrize("decoder", REFUSED)
@pytest.mark.parametrize("name", NAMES)
def test_latent_attention_is_refused_unchanged(name: str, decoder: str) -> None:
    model = REFUSED[decoder]()
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn' must hold the linear layers .*kv_a_proj"):
        apply_transforms_(model, [parse_transform(name)], TOKENS)
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())


def test_known_tensors_give_the_same_weights() -> None:
    transforms = [parse_transform(name) for name in ("smoothquant", "pca", "head_hadamard")]
    found, folded = build_tiny_llama(tied=True), build_tiny_llama(tied=True)
    tensors = apply_transforms_(found, transforms, TOKENS)
    again = apply_transforms_(folded, transforms, known=tensors)
    assert all(torch.equal(weight, found.state_dict()[key]) for key, weight in folded.state_dict().items())
    assert fingerprint_transforms(transforms, again) == fingerprint_transforms(transforms, tensors)


def test_fingerprint_knows_names_and_tensors() -> None:
    first, other = parse_transform("hadamard"), parse_transform("random_rotation")
    tensors = {"0 rotation": torch.eye(3)}
    prints = {
        fingerprint_transforms([first], tensors),
        fingerprint_transforms([other], tensors),
        fingerprint_transforms([first], {"0 rotation": 2 * torch.eye(3)}),
        fingerprint_transforms([first], {"1 rotation": torch.eye(3)}),
    }
    assert len(prints) == 4


@pytest.mark.parametrize("name", TRANSFORMS)
def test_names_are_read_back(name: str) -> None:
    parsed = parse_transform(name)
    assert parse_transform(parsed.text) == parsed


def test_options_are_of_their_type() -> None:
    parsed = parse_transform("smoothquant:alpha=0.7:sites=norms")
    assert parsed.options == {"alpha": 0.7, "sites": "norms"}
    assert parse_transform("hadamard:seed=3").options == {"seed": 3}
    assert parse_transform("outliertune").options["alpha"] == 1.0


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"transform must be a known name: got 'haddamard'. Known .*hadamard"):
        parse_transform("haddamard")


def test_unknown_options_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"options of 'hadamard' must be known: got 'alpha=1'. Known options: seed"):
        parse_transform("hadamard:alpha=1")


def test_values_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match=r"option 'seed' of 'hadamard' must be of type int: got 'x'"):
        parse_transform("hadamard:seed=x")


def test_models_that_do_more_than_their_parts_say_are_refused() -> None:
    model = build_tiny_llama()
    output = model.model.layers[0].self_attn.o_proj
    output.register_forward_hook(lambda _, args, result: result.clamp(-0.05, 0.05))
    with pytest.raises(
        ValueError, match=r"transforms must leave the logits as they are: got a difference of .*hadamard"
    ):
        apply_transforms_(model, [parse_transform("hadamard")], TOKENS)
