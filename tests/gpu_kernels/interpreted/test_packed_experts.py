"""Packed experts by the Triton kernels in the interpreter, against the forward of transformers."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.apply import pack_weight
from runtime.formats import FORMATS
from runtime.kernels.triton.packed_experts import packed_experts
from runtime.packed import PackedExperts
from tests.tiny_models import build_tiny_mixtral

NAMES = ("int2_g32", "int3_g64", "int4_channel", "int8_g32_sym")


def build_experts(names: tuple[str, ...] = NAMES) -> Any:
    """Returns the experts of a layer of a tiny Mixtral, each in another format."""
    model: Any = build_tiny_mixtral()
    module = model.model.layers[0].mlp.experts
    for projection in ("gate_up_proj", "down_proj"):
        dense = getattr(module, projection).detach()
        packed = [pack_weight(w, FORMATS[f]) for w, f in zip(dense, itertools.cycle(names), strict=False)]
        del module._parameters[projection]
        module.add_module(projection, PackedExperts(packed))
    return module


def draw_routing(module: Any, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 64, generator=generator)
    routes = [torch.randperm(module.num_experts, generator=generator)[:2] for _ in range(tokens)]
    return x, torch.stack(routes), torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize("names", [NAMES, ("int2_g32_pow2", "int4_channel", "int3_g64_sym_pow2", "int1_g64_sym")])
def test_experts_of_four_widths_equal_the_models_own_forward(names: tuple[str, ...]) -> None:
    module = build_experts(names)
    x, index, weights = draw_routing(module, 7)
    with torch.no_grad():
        expected = type(module).forward.__wrapped__(module, x, index, weights)
    y = packed_experts(x, index, weights, module.gate_up_proj, module.down_proj)
    assert y is not None
    # float32 on both sides, sums of 64 and 128 terms.
    assert float((y - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def test_the_layout_follows_the_weights() -> None:
    module = build_experts()
    x, index, weights = draw_routing(module, 2)
    first = packed_experts(x, index, weights, module.gate_up_proj, module.down_proj)
    assert first is not None
    for expert in module.down_proj.children():
        expert.scale.mul_(2)
    second = packed_experts(x, index, weights, module.gate_up_proj, module.down_proj)
    assert second is not None
    assert torch.equal(second, 2 * first)


def test_what_the_kernels_do_not_compute_is_left_to_others() -> None:
    module = build_experts()
    x, index, weights = draw_routing(module, 2)
    assert packed_experts(x.double(), index, weights, module.gate_up_proj, module.down_proj) is None
    assert packed_experts(x.requires_grad_(), index, weights, module.gate_up_proj, module.down_proj) is None
    other = build_experts(("bf16", "int4_g32"))
    assert packed_experts(x.detach(), index, weights, other.gate_up_proj, other.down_proj) is None
