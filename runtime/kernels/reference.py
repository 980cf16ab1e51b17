"""The reference: what every kernel must compute, in plain PyTorch.

    y = x W' + bias,   W = scale * (codes - zero_point) in float32, rounded to the type of x

It materialises the whole matrix for every product, so it is also the slowest path. With activations that are integers
the sums of a group are integers,

    y = s_x sum over groups of scale * sum_k i_k (codes_k - zero_point) + bias.
"""

import torch
from torch import Tensor, nn

from runtime.packing import unpack_codes
from runtime.quantization import dequantize_codes


def dequantize_stored(codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, bits: int, columns: int) -> Tensor:
    """Returns the float32 matrix [rows, columns] of a weight in its stored layout.

    Args:
        codes: [rows, ceil(columns * bits / 8)] uint8.
        scale: [rows, groups] float16.
        zero_point: [rows, ceil(groups * bits / 8)] uint8, or None for 2**(bits - 1).
        bits: Code width, 1 to 8.
        columns: Weights of a row.
    """
    zeros = None if zero_point is None else unpack_codes(zero_point, bits, scale.shape[1])
    return dequantize_codes(unpack_codes(codes, bits, columns), scale, zeros, bits)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns [..., rows] in the type of x for x [..., columns] and a float32 weight [rows, columns]."""
    return nn.functional.linear(x, weight.to(x.dtype), bias)


def integer_linear_reference(
    integers: Tensor, integer_scale: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor
) -> Tensor:
    """Returns s_x i W' in float64, [rows, out_features], from sums of integers that are exact.

    Args:
        integers: [rows, in_features], whole numbers: the activations in scales.
        integer_scale: [rows], s_x.
        codes: [out_features, in_features], whole numbers.
        scale: [out_features, groups].
        zero_point: [out_features, groups], whole numbers.
    """
    groups, length = scale.shape[1], codes.shape[1] // scale.shape[1]
    i = integers.to(torch.int64).view(-1, groups, length)
    q = codes.to(torch.int64).view(-1, groups, length) - zero_point.to(torch.int64).unsqueeze(-1)
    # [groups, rows, out_features]
    sums = i.transpose(0, 1) @ q.permute(1, 2, 0)
    scaled = sums.to(torch.float64) * scale.to(torch.float64).t().unsqueeze(1)
    y: Tensor = scaled.sum(dim=0) * integer_scale.to(torch.float64).unsqueeze(1)
    return y


def attention_reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """Returns softmax(scaling q k') v, [batch, heads, queries, value_dim], in the type of its arguments.

    Args:
        query: [batch, heads, queries, key_dim].
        key: [batch, key heads, tokens, key_dim]; as many query heads read each, in their order.
        value: [batch, key heads, tokens, value_dim].
        mask: [batch, 1, queries, tokens] bool, True where a query sees a token; None for all of them.
        scaling: Factor of the scores.
    """
    shared = query.shape[1] // key.shape[1]
    scores = scaling * query @ key.repeat_interleave(shared, dim=1).transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1) @ value.repeat_interleave(shared, dim=1)
