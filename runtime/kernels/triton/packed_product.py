"""The product of activations with a packed weight as the checkpoint stores it, by the Triton kernels.

Which formats they multiply, and how, is the table ``PRODUCTS``; all others are left to the reference.
"""

from collections.abc import Callable

from torch import Tensor

from runtime.activation_formats import ActivationFormat, ActivationRounding
from runtime.kernels.triton.fragment_layout import fits_groups
from runtime.kernels.triton.integer_linear import fits_integers, triton_integer_linear
from runtime.kernels.triton.kept_layout import Packed, can_multiply
from runtime.kernels.triton.packed_columns import multiply_columns
from runtime.kernels.triton.packed_fragments import FRAGMENT_KINDS, find_fragments, fits_kernels
from runtime.kernels.triton.packed_group_mixture import multiply_mixed_groups
from runtime.kernels.triton.packed_parts import PARTED_KINDS, multiply_parted
from runtime.kernels.triton.packed_residuals import multiply_residual_blocks
from runtime.kernels.triton.weight_only_linear import triton_linear


def packed_linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor | None:
    """Returns x W' + bias in the type of x, or None where the kernels cannot compute it.

    They can where they run at all (``serves``), for the kinds of ``PRODUCTS`` whose scales are float16 numbers, for
    float16, bfloat16 and float32, and without gradients.

    Args:
        x: [..., in_features].
        weight: The packed weight [out_features, in_features].
        bias: [out_features], or None.
    """
    multiply = PRODUCTS.get(weight.format.kind)
    if multiply is None or not fits_groups(weight.format.group_size) or not can_multiply(x, weight):
        return None
    return multiply(x, weight, bias)


def multiply_fragments(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor | None:
    """Returns x W' + bias for weights of one factor (``fits_kernels``); None for others, or if a scale is no float16.

    Args:
        x: [..., in_features] float16, bfloat16 or float32.
        weight: A packed weight of one of ``FRAGMENT_KINDS``.
        bias: [out_features], or None.
    """
    fragments = find_fragments(weight) if fits_kernels(weight.format) else None
    return None if fragments is None else triton_linear(x, fragments, bias)


PRODUCTS: dict[str, Callable[[Tensor, Packed, Tensor | None], Tensor | None]] = {
    **dict.fromkeys(FRAGMENT_KINDS, multiply_fragments),
    **dict.fromkeys(PARTED_KINDS, multiply_parted),
    "column_mixture": multiply_columns,
    "group_mixture": multiply_mixed_groups,
    "residual_blocks": multiply_residual_blocks,
}


def packed_integer_linear(
    x: Tensor, weight: Packed, bias: Tensor | None, rounding: ActivationRounding
) -> Tensor | None:
    """Returns x^ W' + bias, x^ being x rounded to integers, or None where no kernel multiplies these integers.

    One does where ``packed_linear`` does, for weights of ``fits_integers`` and integers that share a scale in a row.

    Args:
        x: [..., in_features], not rounded yet.
        weight: The packed weight [out_features, in_features].
        bias: [out_features], or None.
        rounding: How x is rounded.
    """
    format_ = rounding.format
    if not isinstance(format_, ActivationFormat) or format_.element or format_.scope == "channel":
        return None
    if not fits_kernels(weight.format) or not can_multiply(x, weight):
        return None
    fragments = find_fragments(weight)
    if fragments is None or not fits_integers(fragments):
        return None
    scales = rounding.list_row_scales(x)
    return triton_integer_linear(x, fragments, bias, scales, reach=format_.reach, limit=format_.limit)
