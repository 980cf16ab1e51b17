"""Activations rounded in the forward pass: the same as rounding by hand, and nothing left behind."""

import pytest
import torch
from transformers import LlamaForCausalLM

from runtime.activation_formats import find_activation_formats, render_activations
from runtime.activation_names import activation_name, is_activation, module_of
from runtime.activation_units import list_activation_candidates, list_activation_units
from runtime.simulated_activations import simulated_activations
from runtime.units import find_units
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral

TOKENS = torch.arange(2 * 7).mul(5).remainder(300).view(2, 7)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return build_tiny_llama().requires_grad_(False)


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize(
    ("name", "scale"), [("int8_token", None), ("fp8_tensor", None), ("int4_tensor_static", [0.05]), ("bf16", None)]
)
def test_a_layer_reads_what_is_rendered(name: str, scale: list[float] | None, llama: LlamaForCausalLM) -> None:
    module = llama.model.layers[0].mlp.down_proj
    seen: list[torch.Tensor] = []
    before = logits(llama)
    [format_] = find_activation_formats([name])
    keep = module.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
    logits(llama)
    keep.remove()
    with simulated_activations(llama, {"model.layers.0.mlp.down_proj": (name, scale)}):
        keep = module.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
        changed = logits(llama)
        keep.remove()
    expected = render_activations(seen[0], format_, None if scale is None else torch.tensor(scale))
    assert torch.equal(seen[1], expected)
    assert not torch.equal(changed, before)
    assert torch.equal(logits(llama), before)


def test_static_scales_by_channel(llama: LlamaForCausalLM) -> None:
    width = llama.model.layers[0].mlp.down_proj.in_features
    scheme = {"model.layers.0.mlp.down_proj": ("int8_channel_static", [0.01] * width)}
    with simulated_activations(llama, scheme):
        one = logits(llama)
    with simulated_activations(llama, {"model.layers.0.mlp.down_proj": ("int8_tensor_static", [0.01])}):
        assert torch.equal(logits(llama), one)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (
            {"model.layers.9.mlp.down_proj": ("int8_token", None)},
            r"1 unknown names, first 'model.layers.9.mlp.down_proj'",
        ),
        ({"model.layers.0.mlp.down_proj": ("int8_tensor_static", None)}, "a scale of each tensor: got none of 1"),
        ({"model.layers.0.mlp.down_proj": ("int8_channel_static", [1.0])}, "a scale of each channel: got 1 of "),
        ({"model.layers.0.mlp.down_proj": ("int7_token", None)}, "must be a known name"),
    ],
)
def test_refusals(scheme: dict[str, tuple[str, list[float] | None]], message: str, llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match=message), simulated_activations(llama, scheme):
        pass


def test_units_are_the_inputs_of_linear_layers(llama: LlamaForCausalLM) -> None:
    weights = find_units(llama, fuse=(r"self_attn\.(q|k|v)_proj",))
    units = list_activation_units(weights)
    assert len(units) == 2 * 5 and all(unit.kind == "activation" and not unit.weights for unit in units)
    fused = units[0]
    assert fused.modules == tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
    assert is_activation(fused.name) and not is_activation("model.layers.0.self_attn.q_proj.weight")
    assert module_of(activation_name(fused.modules[0])) == fused.modules[0]
    # Experts are no modules of their own.
    mixture = list_activation_units(find_units(build_tiny_mixtral()))
    assert {unit.role.removesuffix(".input") for unit in mixture} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    only_embedding = [unit for unit in weights if unit.kind == "embedding"]
    with pytest.raises(ValueError, match="need linear layers outside of experts: got none in 1 units"):
        list_activation_candidates(only_embedding, ["bf16"])
