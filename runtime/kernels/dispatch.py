"""Which path computes a product with a packed weight.

The Triton kernels on CUDA devices (and on the CPU where Triton's interpreter is asked for), the compiled CPU kernels
on the CPU for what ``weight_views`` has a view of; the reference everywhere else: other devices, float64, formats that
the kernels do not know, and wherever a gradient is wanted. ``kernel_path`` and the environment variable BITPLAN_KERNELS
name a path instead: ``reference``, or an instruction set of ``runtime.kernels.cpu.LEVELS``.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from runtime.activation_formats import ActivationRounding
from runtime.kernels import triton as triton_kernels
from runtime.kernels.cpu import LEVELS, CpuKernels, Product, load_kernels
from runtime.kernels.matrices import Matrix, StoredMatrix, describe_matrix
from runtime.kernels.reference import dequantize_stored, linear_reference
from runtime.kernels.stored_planes import Packed, has_codes, stored_matrix
from runtime.kernels.weight_views import find_matrix

AUTOMATIC, REFERENCE = "auto", "reference"
PATHS = (AUTOMATIC, REFERENCE, *LEVELS)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_path: ContextVar[str] = ContextVar("kernel_path")


@contextmanager
def kernel_path(name: str) -> Iterator[None]:
    """Computes products by one path inside the context.

    Args:
        name: One of ``PATHS``.

    Raises:
        ValueError: If there is no such path, or the processor does not have it.
    """
    if name in LEVELS:
        load_kernels(name)
    token = _path.set(_check_path(name))
    try:
        yield
    finally:
        _path.reset(token)


def selected_kernels() -> CpuKernels | None:
    """Returns the CPU kernels in use, or None where the reference is."""
    path = _selected_path()
    if path == REFERENCE:
        return None
    return load_kernels(None if path == AUTOMATIC else path)


def uses_triton(device: torch.device) -> bool:
    """Returns True where products on a device are the Triton kernels', as far as they know the format."""
    return triton_kernels.serves(device.type) and _selected_path() == AUTOMATIC


def linear(x: Tensor, weight: Packed, bias: Tensor | None, rounding: ActivationRounding | None = None) -> Tensor:
    """Returns x W' + bias, [..., rows] in the type of x, for x [..., columns].

    Args:
        x: What is multiplied, before it is rounded.
        weight: The packed weight [rows, columns].
        bias: [rows], or None.
        rounding: How x is rounded first. Where the Triton kernels multiply the integers themselves, their sums are
            exact; elsewhere what they stand for is multiplied, rounded to the type of x.
    """
    if rounding is not None:
        product = _multiply_integers(x, weight, bias, rounding)
        return linear(rounding.render(x), weight, bias) if product is None else product
    if uses_triton(x.device):
        # Imported where it is needed: on other machines there may be no Triton.
        from runtime.kernels.triton.packed_product import packed_linear

        product = packed_linear(x, weight, bias)
        if product is not None:
            return product
    if x.dtype not in _KERNEL_DTYPES:
        return linear_reference(x, weight(), bias)
    if torch.compiler.is_compiling():
        if weight.format.kind != "int" or not has_codes(weight.format):
            return linear_reference(x, weight(), bias)
        stored = stored_matrix(weight)
        y: Tensor = torch.ops.bitplan.packed_linear(x, *stored[:3], stored.bits, stored.columns)
        return y if bias is None else y + bias
    matrix = None if x.requires_grad and torch.is_grad_enabled() else find_matrix(weight, x.device)
    kernels = None if matrix is None else selected_kernels()
    if matrix is None or kernels is None or not _fits(x, weight, bias):
        return linear_reference(x, weight(), bias)
    return _multiply(kernels, x, matrix, bias)


def _multiply_integers(x: Tensor, weight: Packed, bias: Tensor | None, rounding: ActivationRounding) -> Tensor | None:
    if not uses_triton(x.device):
        return None
    from runtime.kernels.triton.packed_product import packed_integer_linear

    return packed_integer_linear(x, weight, bias, rounding)


def linear_many(xs: Sequence[Tensor], weights: Sequence[Packed]) -> list[Tensor]:
    """Returns x W' of every pair; those that have a kernel are computed in one call.

    Args:
        xs: [tokens, columns] each, of one type.
        weights: As many packed weights [rows, columns].
    """
    kernels = selected_kernels()
    found = [find_matrix(weight, x.device) for x, weight in zip(xs, weights, strict=True)]
    if kernels is None or any(x.dtype not in _KERNEL_DTYPES for x in xs):
        found = [None] * len(xs)
    products = [
        Product(x.to(torch.float32).contiguous(), matrix)
        for x, matrix in zip(xs, found, strict=True)
        if matrix is not None
    ]
    computed = iter(kernels.multiply(products) if kernels is not None and products else ())
    return [
        linear_reference(x, weight(), None) if matrix is None else next(computed).to(x.dtype)
        for x, weight, matrix in zip(xs, weights, found, strict=True)
    ]


def dequantize(weight: Packed, rows: Tensor | None = None) -> Tensor | None:
    """Returns the float32 matrix, or rows of it, by a kernel; None where there is none for it.

    Args:
        weight: The packed weight.
        rows: [n] of an integer type, or None.
    """
    if not has_codes(weight.format) or torch.compiler.is_compiling():
        return None
    matrix = find_matrix(weight, torch.device("cpu") if rows is None else rows.device)
    kernels = None if matrix is None else selected_kernels()
    if matrix is None or kernels is None:
        return None
    if rows is None:
        return kernels.dequantize(matrix)
    # As an index of torch: negative ones count from the end, others out of range are refused.
    if rows.numel() and not -weight.shape[0] <= int(rows.min()) <= int(rows.max()) < weight.shape[0]:
        return None
    rows = rows.to(torch.int64)
    return kernels.dequantize(matrix, torch.where(rows < 0, rows + weight.shape[0], rows).contiguous())


def _fits(x: Tensor, weight: Packed, bias: Tensor | None) -> bool:
    # What does not fit is the reference's to refuse, as torch does.
    return x.shape[-1] == weight.shape[1] and (bias is None or bias.dtype == x.dtype)


def _multiply(kernels: CpuKernels, x: Tensor, matrix: Matrix, bias: Tensor | None) -> Tensor:
    if x.dtype is torch.float32:
        return kernels.multiply_one(x.contiguous(), matrix, None if bias is None else bias.contiguous())
    added = None if bias is None else bias.to(torch.float32).contiguous()
    return kernels.multiply_one(x.to(torch.float32).contiguous(), matrix, added).to(x.dtype)


def _selected_path() -> str:
    return _path.get(None) or _check_path(os.environ.get("BITPLAN_KERNELS", AUTOMATIC))


def _check_path(name: str) -> str:
    if name not in PATHS:
        msg = f"a kernel path must be a known name: got '{name}'. Known paths: {', '.join(PATHS)}."
        raise ValueError(msg)
    return name


@torch.library.custom_op("bitplan::packed_linear", mutates_args=())
def _packed_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int
) -> Tensor:
    """The product as one operation that torch.compile does not look into."""
    kernels = selected_kernels() if x.device.type == "cpu" else None
    stored = StoredMatrix(codes, scale, zero_point, bits, columns)
    if kernels is None or x.shape[-1] != columns:
        dense = dequantize_stored(codes, scale, zero_point, bits=bits, columns=columns)
        return linear_reference(x, dense, None)
    return _multiply(kernels, x, describe_matrix(stored), None)


@_packed_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, columns: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _keep_weight(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    _, codes, scale, zero_point, *sizes = inputs
    ctx.save_for_backward(codes, scale, zero_point)  # type: ignore[arg-type]
    ctx.sizes = sizes  # type: ignore[attr-defined]


def _gradient(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    codes, scale, zero_point = ctx.saved_tensors  # type: ignore[attr-defined]
    bits, columns = ctx.sizes  # type: ignore[attr-defined]
    dense = dequantize_stored(codes, scale, zero_point, bits=bits, columns=columns)
    return gradient @ dense.to(gradient.dtype), None, None, None, None, None


_packed_linear.register_autograd(_gradient, setup_context=_keep_weight)
