"""Products with a weight of groups of 2 and of 4 bits and outliers by the Triton kernels.

One launch multiplies the groups, one the outliers; both are addends of one sum, as the splits of k are. Any number of
rows of x is multiplied by the codes: even for thousands this takes less time than to dequantize the weight in PyTorch.
"""

from dataclasses import fields, replace

import torch
import triton
from torch import Tensor

from runtime.kernels.triton.devices import Device
from runtime.kernels.triton.group_mixture_kernel import group_mixture_kernel, outlier_kernel
from runtime.kernels.triton.group_mixture_layout import HIGH_BITS, MixedGroups
from runtime.kernels.triton.launch_table import MOST_ROWS, Launch, LaunchKey, find_bucket, find_launch
from runtime.kernels.triton.product_launch import (
    find_device,
    launch_product,
    multiply_float32,
    multiply_split,
    pad_rows,
)

_OUTLIER_BLOCK = 128
# Of one program: the sums of both parts need registers beside those of all.
_MOST_BLOCK_ROWS = 16


def group_mixture_linear(x: Tensor, weight: MixedGroups, bias: Tensor | None = None) -> Tensor:
    """Returns y = x W' + bias in the type of x.

    Args:
        x: [..., in_features] float16, bfloat16 or float32, on the device of the weight.
        weight: The weight [out_features, in_features] as ``pack_mixed_groups`` made it.
        bias: [out_features], or None.

    Returns:
        [..., out_features].
    """
    tensors = [getattr(weight, name) for name in _TENSORS]
    y: Tensor = torch.ops.bitplan.group_mixture_linear(x, tensors, bias, weight.group_size, weight.shape[0])
    return y


_TENSORS = tuple(field.name for field in fields(MixedGroups) if field.name not in ("shape", "group_size"))


@torch.library.custom_op("bitplan::group_mixture_linear", mutates_args=())
def group_mixture_linear_op(
    x: Tensor, tensors: list[Tensor], bias: Tensor | None, group_size: int, out_features: int
) -> Tensor:
    """Returns x W' + bias; the arguments are the fields of ``MixedGroups``."""
    weight = MixedGroups(
        shape=(out_features, x.shape[-1]), group_size=group_size, **dict(zip(_TENSORS, tensors, strict=True))
    )
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = _multiply_float32(weight, rows, bias) if x.dtype == torch.float32 else _multiply_half(weight, rows, bias)
    return y.view(*x.shape[:-1], out_features)


@group_mixture_linear_op.register_fake
def _(x: Tensor, tensors: list[Tensor], bias: Tensor | None, group_size: int, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _multiply_float32(weight: MixedGroups, x: Tensor, bias: Tensor | None) -> Tensor:
    def few(x: Tensor, bias: Tensor | None, out_dtype: torch.dtype, exponent: Tensor | None = None) -> Tensor:
        launch = _plan(weight, x)

        def launch_splits(out: Tensor, added: Tensor | None) -> None:
            launch_product(group_mixture_kernel, out, x, added, exponent, launch, **_list_arguments(weight))

        shape = (x.shape[0], weight.shape[0])
        return multiply_split(launch_splits, bias, splits=launch.splits, shape=shape, dtype=out_dtype, device=x.device)

    y = multiply_float32(x, weight.shape[0], few)
    if len(weight.outlier) and len(x):
        of_outliers = torch.empty_like(y)
        _launch_outliers(weight, x, of_outliers)
        y = y + of_outliers
    return y if bias is None else y + bias


def _multiply_half(weight: MixedGroups, x: Tensor, bias: Tensor | None) -> Tensor:
    launch, padded = _plan(weight, x), pad_rows(x)
    splits = [launch.splits, 1 if len(weight.outlier) else 0]

    def launch_splits(out: Tensor, added: Tensor | None) -> None:
        of_groups, of_outliers = torch.split(out, splits)
        launch_product(group_mixture_kernel, of_groups, padded, added, None, launch, **_list_arguments(weight))
        if len(of_outliers):
            _launch_outliers(weight, x, of_outliers[0])

    shape = (x.shape[0], weight.shape[0])
    return multiply_split(launch_splits, bias, splits=sum(splits), shape=shape, dtype=x.dtype, device=x.device)


def _plan(weight: MixedGroups, x: Tensor) -> Launch:
    device = find_device(x.device)
    key = LaunchKey(
        architecture=device.architecture,
        bits=HIGH_BITS,
        rows=find_bucket(min(MOST_ROWS, x.shape[0])),
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        group_size=weight.group_size,
    )
    launch = plan_mixture(key, device)
    return launch if x.shape[0] <= MOST_ROWS else replace(launch, splits=1)


def plan_mixture(key: LaunchKey, device: Device) -> Launch:
    """Returns how a product with groups of 2 and of 4 bits is launched: few rows of x in a program, a tile in a step.

    Args:
        key: The product, of 2 bits.
        device: What the prior reckons with.
    """
    launch = find_launch(key, device)
    return replace(launch, block_m=min(_MOST_BLOCK_ROWS, launch.block_m), tiles=1)


def _launch_outliers(weight: MixedGroups, x: Tensor, out: Tensor) -> None:
    """Writes x [M, in_features] times the outliers to out [M, out_features] float32."""
    M, N = out.shape
    outlier_kernel[(triton.cdiv(N, _OUTLIER_BLOCK), M)](
        x, weight.outlier, weight.outlier_column, out, N, len(weight.outlier), x.stride(0), BLOCK=_OUTLIER_BLOCK
    )


def _list_arguments(weight: MixedGroups) -> dict[str, object]:
    return {
        "words_ptr": weight.words,
        "scale_ptr": weight.scale.view(torch.int32),
        "zero_ptr": weight.zero_point,
        "low_words_ptr": weight.low_words,
        "low_zero_ptr": weight.low_zero,
        "flags_ptr": weight.flags,
        "starts_ptr": weight.starts,
        "row_blocks": weight.words.shape[2],
        "GROUP_SIZE": weight.group_size,
    }
