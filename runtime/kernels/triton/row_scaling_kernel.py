"""Device code: rows of activations as float16 numbers times a power of two for each row.

Codes of 8 bits fit the mantissa of float16 and not that of bfloat16, so for them bfloat16 activations become float16:
their 8 bits fit too, and the exponent of the row brings its greatest element to [2**13, 2**14). float32 becomes two
numbers, x = 2**e (a + 2**-11 b), with the second in a row of its own.

What is lost: elements of a bfloat16 row down to 2**-30 of its greatest are exact, smaller ones are within 2**-38 of it;
float32 is within 2**-22 of an element, or 2**-35 of the greatest of its row.
"""

import triton
import triton.language as tl

# What b is multiplied by, so that it does not underflow.
SPLIT_SCALE = tl.constexpr(2.0**11)


@triton.jit
def power_of_two(exponent):
    """Returns 2**exponent in float32, for exponents from -126 to 127."""
    return ((127 + exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_elements(x_row, factor_row, element, K, HAS_FACTORS: tl.constexpr):
    """Returns elements of a row, or of its product with a row of factors, in float32; zero past the end."""
    x = tl.load(x_row + element, mask=element < K, other=0.0).to(tl.float32)
    if HAS_FACTORS:
        x *= tl.load(factor_row + element, mask=element < K, other=0.0).to(tl.float32)
    return x


@triton.jit
def scale_rows_kernel(
    x_ptr,
    factor_ptr,
    out_ptr,
    exponent_ptr,
    M,
    K,
    padded_K,
    x_stride,
    HAS_FACTORS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes one row of x, or its products with a row of factors, as PARTS rows of float16; grid (rows, factors).

    Args:
        x_ptr: [rows, K]; with factors each row makes as many rows, one after the other, M in all.
        factor_ptr: [factors, K] float16; read when HAS_FACTORS.
        out_ptr: [PARTS, M, padded_K] float16; zero where there is no element of x.
        exponent_ptr: [PARTS, M] int32, of the power of two that a row is multiplied by.
        M, K: Rows that are written, elements of a row.
        padded_K: Elements of a row that is written.
        x_stride: Elements from one row of x to the next.
        HAS_FACTORS: Multiply each row of x by each row of factors.
        PARTS: 2 for rows that are as exact as float32, 1 for those rounded to float16.
        BLOCK: Elements that are taken at once.
    """
    row = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    x_row = x_ptr + tl.program_id(0).to(tl.int64) * x_stride
    factor_row = factor_ptr + tl.program_id(1).to(tl.int64) * K
    element = tl.arange(0, BLOCK)
    greatest = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, K, BLOCK):
        x = load_elements(x_row, factor_row, first + element, K, HAS_FACTORS)
        greatest = tl.maximum(greatest, tl.abs(x))
    # A float with the exponent bits E is below 2**(E - 126). Both powers of two below must be normal floats.
    bits = tl.max(greatest, axis=0).to(tl.int32, bitcast=True)
    exponent = tl.maximum((bits >> 23) - 126 - 14, -126)
    down = power_of_two(-exponent)
    for first in tl.range(0, padded_K, BLOCK):
        x = load_elements(x_row, factor_row, first + element, K, HAS_FACTORS) * down
        mask = first + element < padded_K
        high = x.to(tl.float16)
        out_row = out_ptr + row.to(tl.int64) * padded_K
        tl.store(out_row + first + element, high, mask=mask)
        if PARTS == 2:
            low = ((x - high.to(tl.float32)) * SPLIT_SCALE).to(tl.float16)
            tl.store(out_row + tl.cast(M, tl.int64) * padded_K + first + element, low, mask=mask)
    for part in tl.static_range(PARTS):
        tl.store(exponent_ptr + part * M + row, exponent)
