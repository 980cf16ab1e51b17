"""The residual stream in another basis: its states are rotated, norms lose their weights, tied tables stay one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime.transforms.residual_rotation import (
    ROTATION,
    find_hadamard_rotation,
    find_random_rotation,
    rotate_residual_,
)
from tests.runtime.transforms.decoders import (
    DECODERS,
    FLOAT32_TOLERANCE,
    FLOAT64_TOLERANCE,
    build_float64,
    compute_logits,
)
from tests.tiny_models import build_tiny_llama


def record_states(model: Any) -> list[Tensor]:
    """Returns the input [S, T, H] of every block."""
    states: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: states.append((*args, kwargs.get("hidden_states"))[0]), with_kwargs=True
        )  # fmt: skip
        for layer in model.model.layers
    ]
    compute_logits(model)
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("name", ["llama, tied", "qwen2, odd widths", "qwen2 mixture"])
@pytest.mark.parametrize("find", [find_hadamard_rotation, find_random_rotation])
def test_states_are_rotated(name: str, find: Any) -> None:
    model = build_float64(name)
    before = record_states(model)
    bases = find(model, None, seed=1)
    rotate_residual_(model, bases)
    for state, rotated in zip(before, record_states(model), strict=True):
        assert (state @ bases[ROTATION] - rotated).abs().max() <= FLOAT64_TOLERANCE


def test_norms_keep_no_weight() -> None:
    model = build_float64("qwen3 mixture")
    rotate_residual_(model, find_hadamard_rotation(model, None))
    for name, norm in model.named_modules():
        if name.endswith(("layernorm", "model.norm")):
            assert bool((norm.weight == 1).all()), name


@pytest.mark.parametrize("name", ["llama, tied", "qwen2, odd widths, tied"])
def test_tied_tables_stay_one_and_gain_a_matrix(name: str) -> None:
    model = DECODERS[name]()
    count = sum(parameter.numel() for parameter in model.parameters())
    width = model.config.hidden_size
    logits = compute_logits(model)
    for seed in range(2):  # a second rotation works on the matrix of the first
        rotate_residual_(model, find_random_rotation(model, None, seed=seed))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert sum(parameter.numel() for parameter in model.parameters()) == count + width**2
        assert (compute_logits(model) - logits).abs().max() <= FLOAT32_TOLERANCE


def test_tables_of_their_own_gain_nothing() -> None:
    model = build_tiny_llama()
    names = set(model.state_dict())
    rotate_residual_(model, find_hadamard_rotation(model, None))
    assert set(model.state_dict()) == names


def test_one_channel_spreads_over_all() -> None:
    """A weight that reads one channel reads all of them, each the same, and a writer likewise."""
    model = build_float64("llama")
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight[:, 1:] = 0
    attention.o_proj.weight[1:] = 0
    read = attention.q_proj.weight[:, :1] * model.model.layers[0].input_layernorm.weight[0] / 8
    written = attention.o_proj.weight[:1] / 8
    rotate_residual_(model, find_hadamard_rotation(model, None))
    assert torch.allclose(attention.q_proj.weight.abs(), read.abs().expand(-1, 64), rtol=1e-12)
    assert torch.allclose(attention.o_proj.weight.abs(), written.abs().expand(64, -1), rtol=1e-12)


def test_weights_keep_their_dtype_and_are_rounded_once() -> None:
    exact, rounded = build_tiny_llama().bfloat16().double(), build_tiny_llama().bfloat16()
    bases = find_hadamard_rotation(exact, None)
    rotate_residual_(exact, bases)
    rotate_residual_(rounded, bases)
    for name, weight in rounded.state_dict().items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, exact.state_dict()[name].bfloat16()), name


def test_norms_that_know_their_basis_are_refused_unchanged() -> None:
    model = build_tiny_llama()
    model.model.layers[1].post_attention_layernorm = nn.LayerNorm(64, bias=False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'model.layers.1.post_attention_layernorm' must be an RMS norm"):
        rotate_residual_(model, find_hadamard_rotation(model, None))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
