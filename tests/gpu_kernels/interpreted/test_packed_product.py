"""Packed modules by the Triton kernels in the interpreter: the reference's results, whole models included."""

import copy
import itertools
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from runtime.apply import apply_formats_, pack_weight
from runtime.formats import FORMATS
from runtime.kernels.triton.packed_product import find_fragments, fits_kernels, packed_linear
from runtime.loading import load_reference
from runtime.packed import PackedWeight, QuantizedLinear
from runtime.powers import power_of_two
from runtime.units import list_weights


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Scales that are powers of two are like others once they are read: one group size stands for all.
NAMES = [
    name
    for name, format_ in FORMATS.items()
    if fits_kernels(format_) and format_.fits(128) and (format_.scale_type == "fp16" or format_.group_size == 64)
]


@pytest.mark.parametrize("name", NAMES)
def test_every_format_multiplies_as_its_reference(name: str) -> None:
    weight = pack_weight(draw(11, 128), FORMATS[name])
    x = draw(2, 3, 128, seed=1)
    y = packed_linear(x, weight, None)
    assert y is not None
    expected = x.double() @ weight().double().t()
    # float32 rounds sums of up to 2 * 1279 steps of s |x| twice, in chains of 128 and the groups.
    scale = float(power_of_two(weight.scale).max() if weight.format.scale_type == "pow2" else weight.scale.max())
    bound = 2 * 132 * 2.0**-24 * 1279 * x.abs().double().sum(-1, keepdim=True) * 2 * scale
    assert bool(((y.double() - expected).abs() <= bound).all())


def test_what_the_kernels_do_not_compute_is_left_to_others() -> None:
    weight, x = pack_weight(draw(8, 64), FORMATS["int4_g64"]), draw(2, 64)
    assert packed_linear(x, weight, None) is not None
    assert packed_linear(x.double(), weight, None) is None
    assert packed_linear(x[:, :32], weight, None) is None
    assert packed_linear(x.clone().requires_grad_(), weight, None) is None
    for other in ("bf16", "int4_g16", "int1_g64", "fp4_e2m1_g64", "mxint8", "q4_0"):
        assert packed_linear(x, pack_weight(draw(8, 64), FORMATS[other]), None) is None
    # A power of two beyond float16.
    tiny = pack_weight(draw(8, 64) * 2.0**-60, FORMATS["int4_g64_pow2"])
    tiny.scale.fill_(-60)
    assert packed_linear(x, tiny, None) is None


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
    names = ("int2_g32", "int3_g64", "int4_channel", "int5_g32_sym", "int6_g64", "int8_g32", "int4_g32")
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
        assert find_fragments(linear.weight) is linear.weight.__dict__["_fragments"][1], "the kernels were used"
        model.set_submodule(name, ReferenceLinear(linear))
    assert float((model(tokens).logits - logits).abs().max()) <= 1e-4 * float(logits.abs().max())
    assert torch.equal(model.generate(tokens, **settings), text)
