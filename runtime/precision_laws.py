"""Laws of time against precision: what a product of a weight with activations costs on different machines.

A law gives the work of y = x W' for T tokens, W [N, K] with operands of w bits and activations of a bits, counted in
products of two 16-bit numbers of the same machine, so that work / (such products a second) is its time:

    bit-parallel     N K T                              GPUs: the width of a stored weight does not matter
    product          N K T  w/16  a/16                  Loom, convolutions and batches: serial in the bits of both
    weight-only      N K    w/16                        Loom, one token: activations are loaded meanwhile
    activation       N K T  a'/16                       DPRed: a' bits that groups of 16 activations need
    signed digits    N K T  d(w) d(a) / d(16)^2         Laconic: nonzero digits of both operands
    zero weights     N K T  max(1 - z(w), 1/3)  a'/16   Bit-Tactical (TCLp): zeros are skipped, 2 places ahead at most
    tiles            ceil(K/4) ceil(N/64) ceil(T/16) ceil(w/2) cycles of 512 such products        BitMoD

d(b), the mean number of nonzero digits, and z(b), the share of zeros, are those of normal numbers rounded to b bits,
the largest of a group at the end of the range; its median among g numbers is m with (2 Phi(m) - 1)^g = 1/2.

What a machine of fixed point reads must be integers: other formats are decoded to 16 bits before, BitMoD excepted.

Papers: Sharify et al. (2017), Loom, arXiv:1706.07853; Delmas Lascorz et al. (2018), DPRed, arXiv:1804.06732; Sharify et
al. (2018), Laconic, arXiv:1805.04513; Delmas et al. (2018), Bit-Tactical, arXiv:1803.03688; Chen et al. (2024), BitMoD,
arXiv:2411.11745, and its simulator.
"""

import functools
import math
from collections.abc import Callable
from statistics import NormalDist

from runtime.formats import Format

Shape = tuple[int, int]
# Format, (out_features, in_features), tokens, bits of activations -> products of two 16-bit numbers.
Law = Callable[[Format, Shape, float, int], float]

FULL_BITS = 16
# Kinds whose codes are integers, or sums of binary planes, times a scale.
_INTEGER_KINDS = ("int", "binary", "ternary", "nested", "double_rounding", "planes", "column_mixture", "group_mixture")
# Activations of DPRed, and what it takes together; codes that Bit-Tactical looks ahead of the one that is due.
_DETECTED_GROUP = 16
_MOST_PROMOTED = 2
_NORMAL = NormalDist()
# BitMoD's array when it decodes: products of a dot product, rows, columns; bits of a weight in one cycle.
_DOT, _ROWS, _COLUMNS, _BITS_PER_CYCLE = 4, 64, 16, 2


def bit_parallel_work(format_: Format, shape: Shape, tokens: float, activation_bits: int) -> float:
    """Returns one product for each weight and token."""
    return math.prod(shape) * tokens


def bit_serial_work(format_: Format, shape: Shape, tokens: float, activation_bits: int) -> float:
    """Returns the work by the weight-only law for up to one token, by the product law for more."""
    share = _mean_of_widths(format_, lambda bits: bits / FULL_BITS)
    weight_only = math.prod(shape) * share * min(tokens, 1.0)
    return max(weight_only, math.prod(shape) * tokens * share * activation_bits / FULL_BITS)


def activation_serial_work(format_: Format, shape: Shape, tokens: float, activation_bits: int) -> float:
    """Returns the work where only the bits count that groups of 16 activations need."""
    return math.prod(shape) * tokens * detected_bits(activation_bits, shape[1]) / FULL_BITS


def signed_digit_work(format_: Format, shape: Shape, tokens: float, activation_bits: int) -> float:
    """Returns the work where pairs of nonzero digits count."""
    group = format_.group_size or shape[1]
    digits = _mean_of_widths(format_, lambda bits: mean_digits(bits, group))
    both = digits * mean_digits(activation_bits, shape[1])
    return math.prod(shape) * tokens * both / mean_digits(FULL_BITS, shape[1]) ** 2


def zero_skipping_work(format_: Format, shape: Shape, tokens: float, activation_bits: int) -> float:
    """Returns the work where zero weights are skipped, as far as one looks ahead, and activations are serial."""
    group = format_.group_size or shape[1]
    effectual = 1.0 - _mean_of_widths(format_, lambda bits: zero_share(bits, group))
    kept = max(effectual, 1.0 / (1 + _MOST_PROMOTED))
    return kept * activation_serial_work(format_, shape, tokens, activation_bits)


def tiled_serial_work(format_: Format, shape: Shape, tokens: float, activation_bits: int) -> float:
    """Returns the work of BitMoD's array, whole tiles, two bits of a weight in a cycle; its types are those stored."""
    steps = math.ceil(format_.bits / _BITS_PER_CYCLE)
    tiles = math.ceil(shape[1] / _DOT) * math.ceil(shape[0] / _ROWS) * math.ceil(tokens / _COLUMNS)
    return tiles * steps * _DOT * _ROWS * _COLUMNS * _BITS_PER_CYCLE / FULL_BITS


LAWS: dict[str, Law] = {
    "bit-parallel": bit_parallel_work,
    "bit-serial": bit_serial_work,
    "activation-serial": activation_serial_work,
    "signed-digit": signed_digit_work,
    "zero-skipping": zero_skipping_work,
    "tiled-serial": tiled_serial_work,
}


def operand_widths(format_: Format) -> tuple[tuple[int, float], ...]:
    """Returns the widths of the operands that a machine of fixed point multiplies by, with the share of each."""
    if format_.mixture is not None:
        wide = format_.mixture.wide_share
        return (format_.mixture.wide.bits, wide), (format_.mixture.narrow.bits, 1.0 - wide)
    integer = format_.kind in _INTEGER_KINDS or (format_.kind == "ggml" and format_.element.startswith("q"))
    return (((format_.bits if integer else FULL_BITS), 1.0),)


def count_signed_digits(value: int) -> int:
    """Returns the nonzero digits of an integer in its non-adjacent form, the fewest of -1, 0 and 1 that there are."""
    # A digit is nonzero where 3 n and n differ.
    magnitude = abs(value)
    return int((3 * magnitude ^ magnitude).bit_count())


def mean_digits(bits: int, group: int) -> float:
    """Returns d(bits) for groups of ``group`` numbers."""
    return sum(share * count_signed_digits(code) for code, share in _code_shares(bits, group))


def zero_share(bits: int, group: int) -> float:
    """Returns z(bits) for groups of ``group`` numbers."""
    return dict(_code_shares(bits, group)).get(0, 0.0)


def detected_bits(bits: int, count: int) -> int:
    """Returns the bits that the largest of 16 of ``count`` numbers needs, when the largest of all needs ``bits``."""
    greatest = (1 << (bits - 1)) - 1
    part = round(greatest * median_greatest(min(_DETECTED_GROUP, count)) / median_greatest(count))
    return 1 + part.bit_length()


def median_greatest(count: int) -> float:
    """Returns the median of the greatest magnitude of ``count`` standard normal numbers."""
    return _NORMAL.inv_cdf((1.0 + 0.5 ** (1.0 / count)) / 2.0)


@functools.cache
def _code_shares(bits: int, group: int) -> tuple[tuple[int, float], ...]:
    """Returns (code, share of the weights) for codes -c .. c, c = 2**(bits - 1) - 1; both signs of 1 for one bit."""
    if bits == 1:
        return (-1, 0.5), (1, 0.5)
    greatest = (1 << (bits - 1)) - 1
    step = median_greatest(group) / greatest
    edges = [_NORMAL.cdf((code - 0.5) * step) for code in range(-greatest + 1, greatest + 1)]
    inner = zip([0.0, *edges], [*edges, 1.0], strict=True)
    return tuple((code, high - low) for code, (low, high) in zip(range(-greatest, greatest + 1), inner, strict=True))


def _mean_of_widths(format_: Format, value: Callable[[int], float]) -> float:
    return sum(share * value(bits) for bits, share in operand_widths(format_))
