"""Which path a packed weight takes, and that its modules behave as modules do."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from runtime.apply import pack_weight
from runtime.formats import FORMATS
from runtime.kernels.cpu import load_kernels
from runtime.kernels.dispatch import kernel_path, selected_kernels
from runtime.packed import QuantizedEmbedding, QuantizedLinear
from runtime.rendering import render
from tests.runtime.kernels.stored_weights import available_kernels

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C++ compiler is here")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_linear(format_name: str = "int4_g64", *, bias: bool = True, rows: int = 19) -> QuantizedLinear:
    added = nn.Parameter(draw(rows, seed=1), requires_grad=False) if bias else None
    return QuantizedLinear(pack_weight(draw(rows, 384), FORMATS[format_name]), added)


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def reference(linear: QuantizedLinear, x: Tensor) -> Tensor:
    with kernel_path("reference"):
        y: Tensor = linear(x)
    return y


WITH_KERNELS = [
    *(n for n, f in FORMATS.items() if f.kind in ("int", "binary") and f.scale_type == "fp16" and f.fits(384)),
    *(
        name
        for name, f in FORMATS.items()
        if f.kind in ("double_rounding", "nested", "column_mixture") or f.element in ("e4m3", "e5m2")
    ),
]


@pytest.mark.parametrize("format_name", WITH_KERNELS)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_kernels_and_reference_agree(format_name: str, bias: bool) -> None:
    linear = make_linear(format_name, bias=bias)
    for shape in ((384,), (1, 384), (2, 3, 384), (0, 384)):
        x = draw(*shape, seed=2)
        y = linear(x)
        assert y.shape == (*shape[:-1], 19)
        assert y.numel() == 0 or relative_error(y, reference(linear, x)) < 2e-4
    # In float32 the two differ: so it was a kernel that ran.
    assert not torch.equal(linear(draw(64, 384)), reference(linear, draw(64, 384)))


@pytest.mark.parametrize("level", [kernels.level for kernels in available_kernels()])
@pytest.mark.parametrize("format_name", ["int1_g64", "int1_g128_sym", "int1_channel"])
def test_one_bit_on_every_instruction_set(format_name: str, level: str) -> None:
    # Columns and rows that fill no vector, a mean that is not zero, few tokens and many.
    linear = QuantizedLinear(pack_weight(draw(37, 384) + 0.3, FORMATS[format_name]))
    with kernel_path(level):
        assert torch.equal(linear.weight(), reference_weight(linear))
        for tokens in (1, 2, 3, 4, 9):
            x = draw(tokens, 384, seed=tokens)
            assert relative_error(linear(x), x.double() @ linear.weight().double().T) < 2e-4


def reference_weight(linear: QuantizedLinear) -> Tensor:
    with kernel_path("reference"):
        dense: Tensor = linear.weight()
    return dense


@pytest.mark.parametrize("format_name", ["int4_g64_pow2", "int1_g64_sym_pow2", "mxfp4", "q4_0"])
def test_formats_without_kernels_are_left_to_the_reference(format_name: str) -> None:
    linear, x = make_linear(format_name), draw(5, 384)
    assert torch.equal(linear(x), reference(linear, x))


@pytest.mark.parametrize("format_name", ["bf16", "fp16"])
def test_floating_point_weights_are_multiplied_as_they_are_stored(format_name: str) -> None:
    linear, x = make_linear(format_name), draw(5, 384)
    expected = x.double() @ linear.weight().double().T + linear.bias.double()
    y = linear(x)
    assert relative_error(y, expected) < 1e-6
    assert not torch.equal(y, reference(linear, x))
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), expected) < 1e-6
    linear.weight.values.zero_()
    assert torch.equal(linear(x), linear.bias.expand(5, -1))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)])
def test_sixteen_bit_activations(dtype: torch.dtype, bound: float) -> None:
    linear = make_linear(bias=False)
    x = draw(3, 384).to(dtype)
    y = linear(x)
    assert y.dtype == dtype
    assert relative_error(y, reference(linear, x.to(torch.float32))) < bound


def test_activations_that_are_not_contiguous() -> None:
    linear = make_linear()
    x = draw(384, 5, seed=3).T
    assert torch.equal(linear(x), linear(x.contiguous()))
    assert torch.equal(linear(x[::2]), linear(x[::2].contiguous()))


def test_what_the_kernels_do_not_do_is_left_to_the_reference() -> None:
    linear = make_linear(bias=False)
    x = draw(3, 384)
    assert torch.equal(linear(x.double()), reference(linear, x.double()))
    wanted = x.clone().requires_grad_()
    linear(wanted).sum().backward()
    assert wanted.grad is not None
    assert torch.allclose(wanted.grad, linear.weight().sum(0).expand(3, -1), atol=1e-4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(draw(3, 383))
    assert linear.to("meta")(x.to("meta")).shape == (3, 19)


@pytest.mark.parametrize("format_name", ["int4_g64", "nested4_8_g64"])
def test_compiled_model_runs_the_kernels_and_has_gradients(format_name: str) -> None:
    linear = make_linear(format_name)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    for tokens in (1, 7):
        x = draw(tokens, 384)
        # The weight of two parts is dequantized, as the reference does it.
        expected = linear(x) if format_name == "int4_g64" else reference(linear, x)
        assert torch.allclose(compiled(x), expected, atol=1e-5)
    wanted = draw(2, 384).requires_grad_()
    compiled(wanted).sum().backward()
    assert wanted.grad is not None
    assert torch.allclose(wanted.grad, linear.weight().sum(0).expand(2, -1), atol=1e-4)
    with kernel_path("reference"):
        assert torch.allclose(compiled(draw(3, 384)), reference(linear, draw(3, 384)), atol=1e-5)


def test_modules_are_copied_saved_and_loaded() -> None:
    linear, x = make_linear("int3_g32"), draw(2, 384)
    y = linear(x)
    assert set(linear.state_dict()) == {"weight.codes", "weight.scale", "weight.zero_point", "bias"}
    copied = copy.deepcopy(linear)
    assert torch.equal(copied(x), y)
    # The copy reads its own memory, and so does a module that was loaded into.
    linear.weight.codes.zero_()
    assert torch.equal(copied(x), y)
    linear.load_state_dict(copied.state_dict(), assign=True)
    assert torch.equal(linear(x), y)


def test_a_cast_leaves_what_is_stored() -> None:
    for format_name in ("int4_g64", "fp16"):
        linear, x = make_linear(format_name, bias=False), draw(2, 384)
        before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
        linear.to(torch.bfloat16)
        assert all(torch.equal(tensor, before[name]) for name, tensor in linear.state_dict().items())
        assert all(tensor.dtype == before[name].dtype for name, tensor in linear.state_dict().items())
        assert linear(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_embedding_rows_are_the_rendered_rows() -> None:
    table, format_ = draw(11, 96), FORMATS["int5_g32"]
    embedding = QuantizedEmbedding(pack_weight(table, format_))
    for tokens in (torch.tensor([[10, 0, 3], [3, 3, 9]]), torch.tensor([-1, 4])):
        assert torch.equal(embedding(tokens), render(table, format_)[tokens])
    with pytest.raises(IndexError, match="out of bounds"):
        embedding(torch.tensor([11]))
    assert torch.equal(pack_weight(table, FORMATS["bf16"])(), table.to(torch.bfloat16).float())


def test_paths_by_name() -> None:
    with kernel_path("portable"):
        kernels = selected_kernels()
        assert kernels is not None
        assert kernels.level == "portable"
        with kernel_path("reference"):
            assert selected_kernels() is None
    assert selected_kernels() is load_kernels(None)
    with pytest.raises(ValueError, match="must be a known name: got 'fast'. Known paths: auto, reference, portable"):
        kernel_path("fast").__enter__()


def test_environment_names_a_path() -> None:
    code = "from runtime.kernels.dispatch import selected_kernels as s; k = s(); print(k and k.level)"
    printed = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "BITPLAN_KERNELS": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for path in ("reference", "portable")
    ]
    assert printed == ["None", "portable"]
