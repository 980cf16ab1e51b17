"""Activations as float16 rows and powers of two: what products with codes of more bits than their type holds read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.kernels.triton.fragment_layout import TILE_CODES
from runtime.kernels.triton.row_scaling_kernel import SPLIT_SCALE, scale_rows_kernel

_BLOCK = 1024


@dataclass(frozen=True, kw_only=True)
class ScaledRows:
    """Rows of activations, x = 2**exponent (values[0] + values[1] / SPLIT_SCALE), almost exactly.

    Args:
        values: [parts, rows, in_features padded to a multiple of 64] float16; two parts for float32, else one.
        exponent: [parts, rows] int32, the same for all parts.
    """

    values: Tensor
    exponent: Tensor


def needs_scaled_rows(dtype: torch.dtype, bits: int, element: int = -1) -> bool:
    """Returns True where activations of a type must become float16 to be multiplied by codes.

    Args:
        dtype: Type of the activations.
        bits: Width of the codes.
        element: Mantissa bits of codes that are floats, which become float16 numbers; -1 for integers.
    """
    return dtype == torch.float32 or (dtype == torch.bfloat16 and (bits == 8 or element >= 0))


def scale_rows(x: Tensor, factors: Tensor | None = None) -> ScaledRows:
    """Returns activations as scaled rows; of 16 bits times factors, they are rounded to float16.

    Args:
        x: [rows, in_features] bfloat16 or float32; float16 too with factors.
        factors: [factors, in_features] float16, or None. A row of x is then multiplied by each of them, which makes
            rows * factors rows.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    repeated = 1 if factors is None else len(factors)
    parts, (rows, count) = 2 if x.dtype == torch.float32 else 1, (len(x) * repeated, x.shape[1])
    values = torch.empty((parts, rows, count + -count % TILE_CODES), dtype=torch.float16, device=x.device)
    exponent = torch.empty((parts, rows), dtype=torch.int32, device=x.device)
    if rows:
        scale_rows_kernel[(len(x), repeated)](
            x,
            x if factors is None else factors.contiguous(),
            values,
            exponent,
            rows,
            count,
            values.shape[2],
            x.stride(0),
            HAS_FACTORS=factors is not None,
            PARTS=parts,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return ScaledRows(values=values, exponent=exponent)


def sum_parts(y: Tensor) -> Tensor:
    """Returns the float32 products [parts, rows, out_features] of the parts as those of the rows."""
    return y[0] if y.shape[0] == 1 else y[0] + y[1] / SPLIT_SCALE.value
