"""One set of nested weights, read at several widths: the values of each, what is read, switching in mid-sequence."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from runtime.apply import apply_formats_
from runtime.codecs import CODECS
from runtime.compiled_decoder import install_compiled_decoder_
from runtime.decoder_cache import DecoderCache
from runtime.kernels.cpu import load_kernels
from runtime.kernels.dispatch import kernel_path
from runtime.packed import PackedWeight
from runtime.read_widths import find_lowest_width, list_nested, read_at_width, set_width_
from runtime.units import list_weights
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral

TOKENS = torch.tensor([[7, 90, 31, 200, 5, 88, 14]])
needs_kernels = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler is here")


def make_packed(*formats: str, model: Any = None) -> Any:
    """Returns a model whose weights take the formats in turn."""
    model = model or build_tiny_llama()
    names = list(list_weights(model))
    apply_formats_(model, {name: formats[i % len(formats)] for i, name in enumerate(names)})
    install_compiled_decoder_(model.requires_grad_(False))
    return model


def make_dense(model: Any, width: int) -> Any:
    """Returns the unpacked model with the values that the codecs give for a width."""
    dense = build_tiny_llama().requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            codec, format_ = CODECS[module.format.kind], module.format
            read = width if width in format_.widths else format_.bits
            if codec.at_width is None:
                values = codec.decode(module.tensors, format_, module.shape, None)
            else:
                values = codec.at_width(module.tensors, format_, module.shape, read, None)
            dense.get_parameter(name).data = values
    return dense


def logits_of(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


@pytest.mark.parametrize("formats", [("nested4_8_g32",), ("nested8_g64",), ("nested4_6_g64", "int5_g32", "bf16")])
def test_logits_are_those_of_the_values_of_the_width(formats: tuple[str, ...]) -> None:
    model = make_packed(*formats)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    full = logits_of(model)
    for width in (4, 8):
        set_width_(model, width)
        expected = logits_of(make_dense(model, width))
        with kernel_path("reference"):
            assert torch.equal(logits_of(model), expected)
        # The kernels round activations to 16 bits.
        assert (logits_of(model) - expected).norm() <= 2e-3 * expected.norm()
    set_width_(model, None)
    assert torch.equal(logits_of(model), full)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_layers_are_switched_by_themselves() -> None:
    model = make_packed("nested4_8_g32")
    set_width_(model, 4, layers=[1])
    widths = {name: weight.width for name, weight in list_nested(model).items()}
    assert {name for name, width in widths.items() if width == 4} == {n for n in widths if ".layers.1." in n}
    dense, whole = make_dense(model, 4), make_dense(model, 8)
    for name, parameter in whole.named_parameters():
        if ".layers.1." not in name:
            dense.get_parameter(name).data = parameter.data
    with kernel_path("reference"):
        assert torch.equal(logits_of(model), logits_of(dense))


def test_a_width_between_two_is_read_at_the_lower_one() -> None:
    model = make_packed("nested4_6_g32", "nested8_g64")
    set_width_(model, 7)
    assert {weight.width for weight in list_nested(model).values()} == {6}
    set_width_(model, 5)
    assert {weight.width for weight in list_nested(model).values()} == {4}
    assert find_lowest_width(model) == 4
    with read_at_width(model, 6):
        assert {weight.width for weight in list_nested(model).values()} == {6}
    assert {weight.width for weight in list_nested(model).values()} == {4}


@needs_kernels
def test_reading_at_the_low_width_needs_no_byte_of_the_rest() -> None:
    """With NaN in place of nothing: codes of the rest that were overwritten change only the full width."""
    model = make_packed("nested4_8_g32")
    low = {}
    for turn in ("as written", "overwritten"):
        set_width_(model, 4)
        low[turn] = logits_of(model), model(TOKENS, past_key_values=DynamicCache()).logits
        set_width_(model, None)
        full = logits_of(model)
        if turn == "as written":
            before = full
            for weight in list_nested(model).values():
                weight.get_buffer("codes_rest").fill_(0)
    assert all(map(torch.equal, low["as written"], low["overwritten"]))
    assert not torch.allclose(before, full, atol=1e-2)


@needs_kernels
def test_switching_in_the_middle_of_a_sequence() -> None:
    model = make_packed("nested4_8_g32")
    cache: Any = DynamicCache()
    parts = torch.split(TOKENS, [3, 2, 2], dim=1)
    found = []
    for part, width in zip(parts, (None, 4, None), strict=True):
        set_width_(model, width)
        output = model(part, past_key_values=cache)
        cache = output.past_key_values
        assert isinstance(cache, DecoderCache)
        found.append(output.logits)
    plain = DynamicCache()
    for part, width, logits in zip(parts, (8, 4, 8), found, strict=True):
        expected = make_dense(model, width)(part, past_key_values=plain).logits
        assert (logits - expected).norm() <= 2e-3 * expected.norm()


def test_experts_are_switched_too() -> None:
    model = make_packed("nested4_8_g32", "int3_g32", model=build_tiny_mixtral())
    assert any(".experts." in name for name in list_nested(model))
    found = []
    for width in (8, 4):
        set_width_(model, width)
        with kernel_path("reference"):
            expected = logits_of(model)
        found.append(logits_of(model))
        assert (found[-1] - expected).norm() <= 2e-3 * expected.norm()
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def test_what_cannot_be_read_is_refused() -> None:
    model = make_packed("nested4_8_g32")
    with pytest.raises(ValueError, match="at least the lowest of every nested weight: got width=3, the lowest is 4"):
        set_width_(model, 3)
    with pytest.raises(ValueError, match="layers must be 0 to 1 of the model: got layer 2"):
        set_width_(model, 4, layers=[0, 2])
    plain = make_packed("int4_g32")
    with pytest.raises(ValueError, match="must find nested weights: got none in this model or these layers"):
        set_width_(plain, 4)
    with pytest.raises(ValueError, match="must find nested weights"):
        find_lowest_width(nn.Linear(2, 2))
