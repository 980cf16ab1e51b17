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


@pytest.mark.parametrize(
    "names",
    [
        NAMES,
        ("int2_g32_pow2", "int4_channel", "int3_g64_sym_pow2", "int1_g64_sym"),
        ("mxfp4", "nvfp4", "ternary_g64", "fp8_e4m3_channel"),
        ("int1_g64", "int4_g32", "mxint8", "fp6_e2m3_g64"),
    ],
    ids="-".join,
)
def test_experts_of_four_formats_equal_the_models_own_forward(names: tuple[str, ...]) -> None:
    module = build_experts(names)
    x, index, weights = draw_routing(module, 7)
    with torch.no_grad():
        expected = type(module).forward.__wrapped__(module, x, index, weights)
    y = packed_experts(x, index, weights, module.gate_up_proj, module.down_proj)
    assert y is not None
    # float32 on both sides, sums of 64 and 128 terms.
    assert float((y - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def test_only_weights_of_several_parts_are_multiplied_alone() -> None:
    """Those the kernels of dense layers read are theirs; nothing but 16-bit weights is the reference's."""
    module = build_experts(("nvfp4", "nested8_g64", "int4_g32", "bf16"))
    x, index, weights = draw_routing(module, 7)
    with torch.no_grad():
        expected = type(module).forward.__wrapped__(module, x, index, weights)
    y = packed_experts(x, index, weights, module.gate_up_proj, module.down_proj)
    assert y is not None
    assert float((y - expected).abs().max()) <= 2e-5 * float(expected.abs().max())
    for projection in (module.gate_up_proj, module.down_proj):
        assert set(projection.__dict__["_fragment_experts"][1].others) == {1, 3}
        assert projection.expert(1).__dict__["_fragments"][1] is not None
        assert not any("_fragments" in projection.expert(i).__dict__ for i in (0, 2, 3))


def test_a_scale_beyond_the_kernels_takes_one_expert_out_of_the_launch() -> None:
    module = build_experts(("mxfp4", "int4_g32"))
    x, index, weights = draw_routing(module, 3)
    module.down_proj.expert(0).scale[0, 0] = 0
    with torch.no_grad():
        expected = type(module).forward.__wrapped__(module, x, index, weights)
    y = packed_experts(x, index, weights, module.gate_up_proj, module.down_proj)
    assert y is not None
    assert set(module.down_proj.__dict__["_fragment_experts"][1].others) == {0}
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
