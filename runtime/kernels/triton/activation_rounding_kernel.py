"""Device code: rows of activations rounded to integers of 8 bits or fewer, in the order of an integer product.

    i = clamp(round(x / s), -LIMIT, LIMIT - 1),    s = max |x| / REACH over a row, or given.

The same numbers as ``runtime.activation_formats`` gives: divisions are rounded correctly, halves go to even numbers. A
row that holds a number that is none has a scale that is none.
"""

import triton
import triton.language as tl

from runtime.kernels.triton.integer_unpacking import find_other_steps

# 1.5 * 2**23: added to a number below 2**22 it leaves the nearest integer in the last bits of the mantissa.
_ROUNDING_CONSTANT = tl.constexpr(12582912.0)
_LEAST_SCALE_BITS = tl.constexpr(0x00800000)
_INFINITE_BITS = tl.constexpr(0x7F800000)


@triton.jit
def round_rows_kernel(
    x_ptr,
    given_ptr,
    out_ptr,
    x_scale_ptr,
    K,
    padded_K,
    x_stride,
    REACH: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    QUAD_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes one row of x as integers, and its scale; grid (rows).

    Args:
        x_ptr: [M, K] float16, bfloat16 or float32.
        given_ptr: [M] float32, the scales when HAS_SCALE.
        out_ptr: [M, padded_K] int8; zero where there is no element of x.
        x_scale_ptr: [M] float32.
        K, padded_K: Elements of a row, and of one that is written.
        x_stride: Elements from one row of x to the next.
        REACH: The magnitude in scales that the greatest element has.
        LIMIT: Integers are from -LIMIT to LIMIT - 1.
        HAS_SCALE: Scales are given.
        QUAD_STEP: The order of k in 64 neighbours (``integer_unpacking``).
        BLOCK: Elements that are taken at once.
    """
    row = tl.program_id(0)
    x_row = x_ptr + row.to(tl.int64) * x_stride
    element = tl.arange(0, BLOCK)
    # Magnitudes compare as their bits do, and what is no number is greater than all.
    greatest = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(0, K, BLOCK):
        x = tl.load(x_row + first + element, mask=first + element < K, other=0.0).to(tl.float32)
        greatest = tl.maximum(greatest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    bits = tl.max(greatest, axis=0)
    if HAS_SCALE:
        scale = tl.load(given_ptr + row)
    else:
        scale = tl.math.div_rn(bits.to(tl.float32, bitcast=True), REACH)
    scale_bits = tl.maximum(scale.to(tl.int32, bitcast=True), _LEAST_SCALE_BITS)
    scale_bits = tl.where(bits > _INFINITE_BITS, bits, scale_bits)
    scale = scale_bits.to(tl.float32, bitcast=True)
    tl.store(x_scale_ptr + row, scale)
    S_STEP: tl.constexpr = find_other_steps(QUAD_STEP)[0]
    U_STEP: tl.constexpr = find_other_steps(QUAD_STEP)[1]
    within = (element >> 5 & 1) * S_STEP + (element >> 4 & 1) * U_STEP + (element & 1) * QUAD_STEP
    source = (element // 64) * 64 + within + (element >> 2 & 3) * 2 + (element >> 1 & 1)
    for first in tl.range(0, padded_K, BLOCK):
        x = tl.load(x_row + first + source, mask=first + source < K, other=0.0).to(tl.float32)
        steps = tl.math.div_rn(x, tl.broadcast_to(scale, (BLOCK,)))
        steps = tl.minimum(tl.maximum(steps, -LIMIT), LIMIT - 1)
        rounded = (steps + _ROUNDING_CONSTANT).to(tl.int32, bitcast=True)
        out = out_ptr + row.to(tl.int64) * padded_K + first + element
        tl.store(out, rounded.to(tl.int8), mask=first + element < padded_K)
