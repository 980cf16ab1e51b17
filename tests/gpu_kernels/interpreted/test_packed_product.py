"""Packed modules by the Triton kernels in the interpreter: the reference's results, whole models included."""

import copy
import itertools
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from runtime.apply import apply_formats_, pack_weight
from runtime.elements import ELEMENTS
from runtime.formats import FORMATS
from runtime.kernels.triton.packed_fragments import find_fragments, fits_kernels
from runtime.kernels.triton.packed_product import packed_linear
from runtime.kernels.triton.weight_only_linear import dequantize_fragments
from runtime.loading import load_reference
from runtime.packed import PackedWeight, QuantizedLinear
from runtime.packing import pack_codes
from runtime.units import list_weights
from tests.gpu_kernels.interpreted.products import bound_sums


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Scales that are powers of two are like others once they are read: one group size stands for all.
NAMES = [
    name
    for name, format_ in FORMATS.items()
    if fits_kernels(format_) and format_.fits(128) and (format_.scale_type != "pow2" or format_.group_size == 64)
]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_multiplies_as_its_reference(name: str) -> None:
    weight = pack_weight(draw(11, 128), FORMATS[name])
    x = draw(2, 3, 128, seed=1)
    y = packed_linear(x, weight, None)
    assert y is not None
    expected = x.double() @ weight().double().t()
    bound = bound_sums(x, weight)
    assert bool(((y.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("name", [n for n, format_ in FORMATS.items() if fits_kernels(format_) and format_.fits(768)])
def test_no_more_is_read_than_is_stored(name: str) -> None:
    """Within 3 % of the checkpoint's bytes, for rows that no padding makes longer, or 3.3 % in groups of 16.

    More than is stored are zero points of 3 and of 5 to 7 bits: 5 bits of 93 become 8 in the worst case; and ternary
    digits, which are read at 2 bits instead of 1.6.
    """
    weight = pack_weight(draw(16, 768), FORMATS[name])
    fragments = find_fragments(weight)
    assert fragments is not None
    most = 1.033 if weight.format.group_size == 16 else 1.25 if weight.format.kind == "ternary" else 1.03
    assert fragments.read_bytes <= most * weight.format.storage_bytes(weight.shape)


ELEMENT_NAMES = [name for name in NAMES if FORMATS[name].kind == "element"]


def test_floats_and_block_formats_are_among_them() -> None:
    blocks = {"mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "nvfp4", "nvint4"}
    assert blocks | {"fp8_e4m3_channel", "fp8_e5m2_channel", "int4_g16"} <= set(NAMES)


@pytest.mark.parametrize("name", ELEMENT_NAMES)
def test_every_code_of_an_element_is_read_exactly(name: str) -> None:
    """A weight that holds each finite code in each place of a tile, back in 16 bits: rounded once, or not at all."""
    format_ = FORMATS[name]
    weight = pack_weight(draw(9, 512), format_)
    codes = torch.arange(9 * 512).view(9, 512) * 37 % 2**format_.bits
    finite = torch.tensor(ELEMENTS[format_.element].values).isfinite()
    weight.codes.copy_(pack_codes(torch.where(finite[codes], codes, 0).to(torch.uint8), format_.bits))
    fragments = find_fragments(weight)
    assert fragments is not None
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(dequantize_fragments(fragments, dtype), weight().to(dtype))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8_e4m3_channel", "mxint8", "int1_g64", "ternary_g64"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_activations_of_16_bits(name: str, dtype: torch.dtype) -> None:
    weight = pack_weight(draw(70, 192), FORMATS[name])
    for rows in (3, 66):
        x = draw(rows, 192, seed=1).to(dtype)
        y = packed_linear(x, weight, None)
        assert y is not None and y.dtype == dtype
        # The result is rounded once (the interpreter truncates to bfloat16), and so are dequantized weights.
        dense = weight().double() if rows <= 64 else weight().to(dtype).double()
        rounding = 2.0**-11 if dtype == torch.float16 else 2.0**-7
        expected = x.double() @ dense.t()
        assert bool(((y.double() - expected).abs() <= rounding * expected.abs() + bound_sums(x, weight)).all())


@pytest.mark.parametrize("name", ["int1_g64", "ternary_g64", "ternary_channel_median"])
def test_few_values_are_read_exactly(name: str) -> None:
    """Two values may be far apart, or one and the same: no difference of them is rounded on the way back."""
    weight = pack_weight(draw(9, 192), FORMATS[name])
    if name == "int1_g64":
        weight.low[:3] = torch.tensor([[-6e4], [-1.0], [0.5]], dtype=torch.float16)
        weight.high[:3] = torch.tensor([[2.0**-24], [7e-4], [0.5]], dtype=torch.float16)
    fragments = find_fragments(weight)
    assert fragments is not None
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(dequantize_fragments(fragments, dtype), weight().to(dtype))
    x = draw(3, 192, seed=1)
    y = packed_linear(x, weight, None)
    assert y is not None
    assert bool(((y.double() - x.double() @ weight().double().t()).abs() <= bound_sums(x, weight)).all())


def test_groups_of_zeros_and_scales_far_apart() -> None:
    """OCP's least scale belongs to groups of zeros, and is read as zero; others may be any power of two."""
    dense = draw(8, 128)
    dense[0, :32] = 0
    dense[1] *= 2.0**-100
    weight = pack_weight(dense * 2.0**40, FORMATS["mxfp4"])
    fragments = find_fragments(weight)
    assert fragments is not None and fragments.scale.dtype == torch.float8_e8m0fnu
    assert torch.equal(dequantize_fragments(fragments, torch.bfloat16), weight().to(torch.bfloat16))
    weight.scale[2, 0] = 0
    assert find_fragments(weight) is None


def test_what_the_kernels_do_not_compute_is_left_to_others() -> None:
    weight, x = pack_weight(draw(8, 64), FORMATS["int4_g64"]), draw(2, 64)
    assert packed_linear(x, weight, None) is not None
    assert packed_linear(x.double(), weight, None) is None
    assert packed_linear(x[:, :32], weight, None) is None
    assert packed_linear(x.clone().requires_grad_(), weight, None) is None
    for other in ("bf16", "fp4_g64", "bitmod4_g64", "q4_0"):
        assert packed_linear(x, pack_weight(draw(8, 64), FORMATS[other]), None) is None


def test_powers_of_two_beyond_float16() -> None:
    weight, x = pack_weight(draw(8, 64), FORMATS["int4_g64_pow2"]), draw(2, 64)
    weight.scale.fill_(-60)
    y = packed_linear(x, weight, None)
    assert y is not None
    expected = x.double() @ weight().double().t()
    assert bool(((y.double() - expected).abs() <= bound_sums(x, weight)).all())


def test_compiled_modules_use_what_was_made_before() -> None:
    weight, x = pack_weight(draw(8, 64), FORMATS["int3_g64"]), draw(2, 64)
    expected = packed_linear(x, weight, None)
    assert expected is not None

    def multiply(x: Tensor) -> Tensor:
        y = packed_linear(x, weight, None)
        return torch.zeros(2, 8) if y is None else y

    assert torch.equal(torch.compile(multiply, backend="eager", fullgraph=True)(x), expected)


def test_the_layout_is_made_once_and_again_when_the_weight_changes() -> None:
    weight = pack_weight(draw(8, 64), FORMATS["int4_g64"])
    first = find_fragments(weight)
    assert find_fragments(weight) is first
    weight.codes[0, 0] ^= 1
    changed = find_fragments(weight)
    assert not torch.equal(changed.words, first.words)
    # It is no part of what is saved, and a copy of the module does not share it wrongly.
    assert set(weight.state_dict()) == {"codes", "scale", "zero_point"}
    twin = copy.deepcopy(weight)
    twin.scale.mul_(2)
    assert torch.equal(find_fragments(twin).scale, 2 * changed.scale)


class ReferenceLinear(nn.Module):
    """A packed linear layer whose weight is dequantized."""

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.linear.weight(), self.linear.bias)


@pytest.mark.slow
def test_a_model_of_many_widths_generates_the_same_text(tiny_llama_dir: Path) -> None:
    reference = load_reference(str(tiny_llama_dir))
    model = reference.model
    names = ("int2_g32", "int3_g64", "int4_channel", "bcq3_g64", "nested4_6_g32", "int8_g32", "int2_mix25int4_g32")
    names += ("bitstack4_r16", "int5_g32_sym")
    weights = list_weights(model)
    fitting = itertools.cycle(FORMATS[name] for name in names)
    formats = {}
    for name, weight in weights.items():
        in_features = cast(nn.Module, model).get_parameter(weight.parameter).shape[-1]
        formats[name] = next(format_.name for format_ in fitting if format_.fits(in_features))
    apply_formats_(model, formats)
    tokens = torch.randint(0, model.config.vocab_size, (1, 5), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    text, logits = model.generate(tokens, **settings), model(tokens).logits
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert len({cast(PackedWeight, linear.weight).format.bits for linear in linears.values()}) >= 5
    for name, linear in linears.items():
        assert linear.weight.__dict__["_fragments"][1] is not None, "the kernels were used"
        model.set_submodule(name, ReferenceLinear(linear))
    assert float((model(tokens).logits - logits).abs().max()) <= 1e-4 * float(logits.abs().max())
    assert torch.equal(model.generate(tokens, **settings), text)
