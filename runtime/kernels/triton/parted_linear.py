"""Products with a weight that is a sum of parts by the Triton kernels: one launch reads all of them."""

from dataclasses import replace
from functools import partial

import torch
import triton
from torch import Tensor

from runtime.kernels.triton.devices import Device
from runtime.kernels.triton.fragment_layout import TILE_CODES, TILE_ROWS
from runtime.kernels.triton.launch_table import Launch, LaunchKey, find_bucket, find_launch
from runtime.kernels.triton.parted_kernel import dequantize_parts_kernel, parted_kernel
from runtime.kernels.triton.parted_layout import CodePart, PartedWeight, count_tiles
from runtime.kernels.triton.product_launch import (
    INTERPRETED,
    find_device,
    launch_product,
    multiply_rows,
    multiply_split,
)
from runtime.kernels.triton.row_scaling import needs_scaled_rows

_DEQUANTIZE_WARPS = 2
# Of one program: the sums of a part need registers beside those of all parts.
_MOST_BLOCK_ROWS = 16


def parted_linear(x: Tensor, weight: PartedWeight, bias: Tensor | None = None) -> Tensor:
    """Returns y = x W' + bias in the type of x.

    Args:
        x: [..., in_features] float16, bfloat16 or float32, on the device of the weight.
        weight: The weight [out_features, in_features] as ``pack_parts`` made it.
        bias: [out_features], or None.

    Returns:
        [..., out_features].
    """
    y: Tensor = torch.ops.bitplan.parted_linear(
        x,
        weight.words,
        weight.scale,
        bias,
        [part.bits for part in weight.parts],
        [part.zero for part in weight.parts],
        [part.factor for part in weight.parts],
        weight.each_scaled,
        weight.group_size or 0,
        weight.shape[0],
    )
    return y


@torch.library.custom_op("bitplan::parted_linear", mutates_args=())
def parted_linear_op(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: list[int],
    zeros: list[float],
    factors: list[float],
    each_scaled: bool,
    group_size: int,
    out_features: int,
) -> Tensor:
    """Returns x W' + bias; the arguments are the fields of a ``PartedWeight``, group_size 0 for the whole row."""
    parts = zip(bits, zeros, factors, strict=True)
    weight = PartedWeight(
        shape=(out_features, x.shape[-1]),
        parts=tuple(CodePart(bits=b, zero=zero, factor=factor) for b, zero, factor in parts),
        group_size=group_size or None,
        words=words,
        scale=scale,
        each_scaled=each_scaled,
    )
    y = multiply_rows(
        x.reshape(-1, x.shape[-1]),
        bias,
        out_features=out_features,
        scaled=needs_scaled_rows(x.dtype, max(bits)),
        few=partial(_multiply_few, weight),
        dequantize=partial(dequantize_parts, weight),
    )
    return y.view(*x.shape[:-1], out_features)


@parted_linear_op.register_fake
def _(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    bits: list[int],
    zeros: list[float],
    factors: list[float],
    each_scaled: bool,
    group_size: int,
    out_features: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def dequantize_parts(weight: PartedWeight, dtype: torch.dtype, rows: tuple[int, int] | None = None) -> Tensor:
    """Returns the weight [out_features, in_features] rounded once to float16 or bfloat16, or a range of its rows.

    Args:
        weight: The weight.
        dtype: torch.float16 or torch.bfloat16.
        rows: (first, last) rows, the first a multiple of 8.
    """
    first, last = rows or (0, weight.shape[0])
    tiles = count_tiles(weight.shape[1])
    # The interpreter truncates where it should round to bfloat16; there torch rounds.
    stored = torch.float32 if INTERPRETED else dtype
    out = torch.empty((last - first, tiles * TILE_CODES), dtype=stored, device=weight.words.device)
    grid = (triton.cdiv(last - first, TILE_CODES * _DEQUANTIZE_WARPS), tiles)
    dequantize_parts_kernel[grid](
        out_ptr=out,
        first_block=first // TILE_ROWS,
        N=last - first,
        out_stride=out.stride(0),
        WARPS=_DEQUANTIZE_WARPS,
        # Twice as many as the rows are divided among: half a tile in float32 would not fit the registers of one.
        num_warps=2 * _DEQUANTIZE_WARPS,
        **_list_arguments(weight),
    )
    return out[:, : weight.shape[1]].to(dtype)


def _multiply_few(
    weight: PartedWeight, x: Tensor, bias: Tensor | None, out_dtype: torch.dtype, exponent: Tensor | None = None
) -> Tensor:
    """Returns 2**exponent x W' + bias for up to 64 rows of x [M, in_features padded to a multiple of 64]."""
    device = find_device(x.device)
    key = LaunchKey(
        architecture=device.architecture,
        bits=weight.bits,
        rows=find_bucket(x.shape[0]),
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        group_size=weight.group_size,
    )
    launch = plan_parts(key, device)

    def launch_splits(out: Tensor, added: Tensor | None) -> None:
        launch_product(parted_kernel, out, x, added, exponent, launch, **_list_arguments(weight))

    return multiply_split(
        launch_splits,
        bias,
        splits=launch.splits,
        shape=(x.shape[0], weight.shape[0]),
        dtype=out_dtype,
        device=x.device,
    )


def plan_parts(key: LaunchKey, device: Device) -> Launch:
    """Returns how a product with a sum of parts is launched: few rows of x in a program; the bits are those of all."""
    launch = find_launch(key, device)
    return replace(launch, block_m=min(_MOST_BLOCK_ROWS, launch.block_m))


def _list_arguments(weight: PartedWeight) -> dict[str, object]:
    """Returns what both kernels want to know of a weight, by the names of their arguments."""
    return {
        "words_ptr": weight.words,
        "scale_ptr": weight.scale.view(torch.int32),
        "row_blocks": weight.words.shape[1],
        "tiles": count_tiles(weight.shape[1]),
        "PARTS": tuple((part.bits, part.zero, part.factor) for part in weight.parts),
        "SCALES": len(weight.parts) if weight.each_scaled else 1,
        "SCALE": weight.scale_name,
        "GROUP_SIZE": weight.group_size or 0,
    }
