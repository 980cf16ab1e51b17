"""Products with a weight whose columns have two widths, by the Triton kernels: each part multiplies its own columns.

    x W' = x[wide columns] Wide' + x[narrow columns] Narrow'

Both products are addends of one sum, as the splits of k are: they write to one buffer, which is added in its order. So
the result is rounded once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.kernels.triton.fragment_layout import FragmentWeight
from runtime.kernels.triton.launch_table import MOST_ROWS
from runtime.kernels.triton.product_launch import multiply_many, multiply_split, pad_rows
from runtime.kernels.triton.row_scaling import needs_scaled_rows, scale_rows
from runtime.kernels.triton.weight_only_linear import (
    dequantize_fragments,
    launch_weight_only,
    plan_product,
    triton_linear,
)


@dataclass(frozen=True, kw_only=True)
class ColumnParts:
    """A weight [out_features, in_features] in parts of some columns each.

    Args:
        columns: [in_features] int64, the columns of one part after the other.
        parts: The parts [out_features, columns of the part].
    """

    columns: Tensor
    parts: tuple[FragmentWeight, ...]


def column_linear(x: Tensor, weight: ColumnParts, bias: Tensor | None = None) -> Tensor:
    """Returns y = x W' + bias in the type of x.

    Args:
        x: [..., in_features] float16, bfloat16 or float32, on the device of the weight.
        weight: The weight [out_features, in_features].
        bias: [out_features], or None.

    Returns:
        [..., out_features].
    """
    parts = weight.parts
    y: Tensor = torch.ops.bitplan.column_linear(
        x,
        weight.columns,
        [part.words for part in parts],
        [part.scale for part in parts],
        [part.zero_point for part in parts],
        bias,
        [part.shape[1] for part in parts],
        [part.bits for part in parts],
        [part.group_size or 0 for part in parts],
        [part.factor for part in parts],
        parts[0].shape[0],
    )
    return y


@torch.library.custom_op("bitplan::column_linear", mutates_args=())
def column_linear_op(
    x: Tensor,
    columns: Tensor,
    words: list[Tensor],
    scales: list[Tensor],
    zero_points: list[Tensor | None],
    bias: Tensor | None,
    widths: list[int],
    bits: list[int],
    group_sizes: list[int],
    factors: list[float],
    out_features: int,
) -> Tensor:
    """Returns x W' + bias; the arguments are the fields of the parts, ``widths`` their columns."""
    parts = [
        FragmentWeight(
            shape=(out_features, widths[i]),
            bits=bits[i],
            group_size=group_sizes[i] or None,
            words=words[i],
            scale=scales[i],
            zero_point=zero_points[i],
            factor=factors[i],
        )
        for i in range(len(words))
    ]
    gathered = x.reshape(-1, x.shape[-1]).index_select(1, columns)
    y = _multiply(gathered, parts, bias, out_features)
    return y.view(*x.shape[:-1], out_features)


@column_linear_op.register_fake
def _(
    x: Tensor,
    columns: Tensor,
    words: list[Tensor],
    scales: list[Tensor],
    zero_points: list[Tensor | None],
    bias: Tensor | None,
    widths: list[int],
    bits: list[int],
    group_sizes: list[int],
    factors: list[float],
    out_features: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _multiply(x: Tensor, parts: list[FragmentWeight], bias: Tensor | None, N: int) -> Tensor:
    """Returns x W' + bias for x [rows, in_features] with its columns in the order of the parts."""
    pieces = torch.split(x, [part.shape[1] for part in parts], dim=1)
    if x.dtype == torch.float32:
        y = sum(triton_linear(piece, part) for piece, part in zip(pieces, parts, strict=True))
        assert isinstance(y, Tensor)
        return y if bias is None else y + bias
    if x.shape[0] > MOST_ROWS:

        def dequantize(dtype: torch.dtype, rows: tuple[int, int]) -> Tensor:
            return torch.cat([dequantize_fragments(part, dtype, rows) for part in parts], dim=1)

        return multiply_many(x, bias, N, dequantize)
    return _multiply_few(pieces, parts, bias, N)


def _multiply_few(pieces: tuple[Tensor, ...], parts: list[FragmentWeight], bias: Tensor | None, N: int) -> Tensor:
    rows, dtype = pieces[0].shape[0], pieces[0].dtype
    read = [_prepare_rows(piece, part) for piece, part in zip(pieces, parts, strict=True)]
    launches = [plan_product(part, x) for part, (x, _) in zip(parts, read, strict=True)]
    splits = [launch.splits for launch in launches]

    def launch_splits(out: Tensor, added: Tensor | None) -> None:
        addends = torch.split(out, splits)
        for part, launch, addend, (x, exponent) in zip(parts, launches, addends, read, strict=True):
            launch_weight_only(part, launch, addend, x, added, exponent)

    return multiply_split(
        launch_splits, bias, splits=sum(splits), shape=(rows, N), dtype=dtype, device=pieces[0].device
    )


def _prepare_rows(x: Tensor, part: FragmentWeight) -> tuple[Tensor, Tensor | None]:
    """Returns up to 64 rows of x as the part's kernel reads them, and their exponents where they are scaled."""
    if needs_scaled_rows(x.dtype, part.bits, part.element):
        scaled = scale_rows(x)
        return scaled.values[0], scaled.exponent[0]
    return pad_rows(x), None
