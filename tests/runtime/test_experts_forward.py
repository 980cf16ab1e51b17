"""Packed experts in two calls against the model's own loop over experts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.apply import apply_formats_
from runtime.experts_forward import EXPERTS_IMPLEMENTATION, packed_experts_forward
from runtime.kernels.cpu import load_kernels
from runtime.kernels.dispatch import kernel_path
from runtime.packed import PackedExperts
from runtime.units import list_weights
from tests.mixtures import build_tiny_deepseek_v2, build_tiny_olmoe, build_tiny_qwen3_moe
from tests.tiny_models import build_tiny_mixtral

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler is here")
FORMATS = ("int2_g32", "int3_channel", "bf16", "int8_g64", "int4_g64_sym")
BUILDERS = {
    "mixtral": build_tiny_mixtral,
    "qwen3": build_tiny_qwen3_moe,
    "olmoe": build_tiny_olmoe,
    "deepseek_v2": build_tiny_deepseek_v2,
}


def build_packed(name: str) -> tuple[Any, Any]:
    """Returns a mixture whose experts have different widths, and the packed experts of one layer."""
    model = BUILDERS[name]()
    experts = [weight for weight in list_weights(model) if ".experts." in weight]
    apply_formats_(model, {weight: FORMATS[i % len(FORMATS)] for i, weight in enumerate(experts)})
    found = [module for module in model.modules() if isinstance(getattr(module, "down_proj", None), PackedExperts)]
    return model, found[-1]


def draw_routing(tokens: int, k: int, experts: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])
    return index, torch.rand(tokens, k, generator=generator)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_experts_of_different_widths_are_those_of_the_loop(name: str, tokens: int) -> None:
    model, experts = build_packed(name)
    assert model.config._experts_implementation == EXPERTS_IMPLEMENTATION
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
    index, weights = draw_routing(tokens, 2, experts.num_experts, tokens)
    with torch.no_grad():
        y = experts(x, index, weights)
        with kernel_path("reference"):
            expected = experts(x, index, weights)
    assert not torch.equal(y, expected)
    assert (y - expected).norm() <= 3e-4 * expected.norm()
    assert torch.equal(expected, type(experts).forward.__wrapped__(experts, x, index, weights))


def test_numbers_that_are_no_experts_are_skipped() -> None:
    _, experts = build_packed("mixtral")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    index, weights = draw_routing(3, 2, 4, 1)
    index[1] = 4
    with torch.no_grad():
        y = packed_experts_forward(experts, x, index, weights)
        assert torch.equal(y[1], torch.zeros(64))
        assert torch.equal(packed_experts_forward(experts, x, torch.full_like(index, 4), weights), torch.zeros(3, 64))


def test_sixteen_bit_states_keep_their_type() -> None:
    _, experts = build_packed("olmoe")
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    index, weights = draw_routing(5, 3, 8, 2)
    with torch.no_grad():
        y = experts(x.to(torch.bfloat16), index, weights.to(torch.bfloat16))
        expected = experts(x, index, weights)
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() <= 2.0**-6 * expected.norm()


def test_gradients_go_through_the_loop() -> None:
    _, experts = build_packed("mixtral")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    index, weights = draw_routing(3, 2, 4, 3)
    experts(x, index, weights).sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).any())
