"""Packed modules against dense ones with the rendered weight."""

import pytest
import torch
from torch import Tensor, nn

from runtime.apply import pack_weight
from runtime.formats import FORMATS, Format
from runtime.packed import PackedExperts, PackedWeight, QuantizedEmbedding, QuantizedLinear
from runtime.rendering import render


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("format_", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("shape", [(1, 128), (13, 384), (7, 97)])
def test_packed_weight_is_the_rendered_weight(format_: Format, shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    if not format_.fits(shape[1]):
        with pytest.raises(ValueError, match=f"in_features={shape[1]}"):
            PackedWeight(format_, shape)
        return
    packed, rendered = pack_weight(weight, format_), render(weight, format_)
    assert torch.equal(packed(), rendered)
    rows = torch.tensor([shape[0] - 1, 0, 0])
    assert torch.equal(packed(rows), rendered[rows])
    assert format_.name in repr(packed)
    # The modules that a file is loaded into ask for just these tensors.
    empty = PackedWeight(format_, shape)
    assert {n: (t.shape, t.dtype) for n, t in empty.named_buffers()} == {
        n: (t.shape, t.dtype) for n, t in packed.named_buffers()
    }
    assert all(tensor.is_meta for tensor in empty.buffers())


def test_buffers_are_named_and_typed_as_documented() -> None:
    packed = PackedWeight(FORMATS["int3_g32"], (5, 96))
    assert {n: (tuple(t.shape), t.dtype) for n, t in packed.named_buffers()} == {
        "codes": ((5, 36), torch.uint8),
        "scale": ((5, 3), torch.float16),
        "zero_point": ((5, 2), torch.uint8),
    }
    assert set(dict(PackedWeight(FORMATS["int3_g32_sym"], (5, 96)).named_buffers())) == {"codes", "scale"}
    assert PackedWeight(FORMATS["bf16"], (5, 96)).values.dtype == torch.bfloat16
    assert PackedWeight(FORMATS["fp16"], (5, 96)).values.dtype == torch.float16


@pytest.mark.parametrize("format_name", ["int4_g64", "int5_channel_sym", "fp16"])
@pytest.mark.parametrize("bias", [None, draw(7, seed=1)], ids=["no_bias", "bias"])
def test_linear(format_name: str, bias: Tensor | None) -> None:
    weight, format_ = draw(7, 64), FORMATS[format_name]
    linear = QuantizedLinear(pack_weight(weight, format_), None if bias is None else nn.Parameter(bias))
    x = draw(2, 3, 64, seed=2)
    assert torch.equal(linear(x), nn.functional.linear(x, render(weight, format_), bias))
    assert (linear.in_features, linear.out_features) == (64, 7)
    if bias is None:
        assert linear(x.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("format_name", ["int4_g64", "int5_channel_sym", "fp16"])
def test_embedding(format_name: str) -> None:
    table, format_ = draw(11, 64), FORMATS[format_name]
    tokens = torch.tensor([[10, 0, 3], [3, 3, 9]])
    rows = render(table, format_)[tokens]
    assert torch.equal(QuantizedEmbedding(pack_weight(table, format_))(tokens), rows)
    assert torch.equal(QuantizedEmbedding(pack_weight(table, format_), 8.0)(tokens), rows * 8)
    assert QuantizedEmbedding(pack_weight(table, format_))(tokens[0, 0]).shape == (64,)


def test_experts_keep_their_own_formats() -> None:
    formats = [FORMATS[name] for name in ("int2_g64", "bf16", "int8_channel")]
    weights = draw(3, 5, 64)
    experts = PackedExperts([pack_weight(w, f) for w, f in zip(weights, formats, strict=True)])
    for i, (weight, format_) in enumerate(zip(weights, formats, strict=True)):
        assert torch.equal(experts[i], render(weight, format_))
        assert torch.equal(experts[torch.tensor(i)], render(weight, format_))


def test_weights_outside_the_range_are_refused() -> None:
    with pytest.raises(ValueError, match="range of format 'fp16'"):
        pack_weight(torch.full((1, 64), 1e5), FORMATS["fp16"])
