"""Element types of few bits, and the value of each of their codes.

A float of E exponent and M mantissa bits with bias b: the code is sign, exponent e, mantissa m, and

    value = +-2^(e-b) (1 + m / 2^M)   for e > 0,      +-2^(1-b) m / 2^M   for e = 0.

``e4m3`` gives its last code to NaN, ``e5m2`` its last exponent to infinity and NaN; those of 4 and 6 bits are finite
throughout. Integers are in two's complement, ``int8`` with 6 bits after the point (from -2 to 1.984).

Source: OCP Microscaling Formats (MX) v1.0, section 5.3; OCP 8-bit Floating Point, revision 1.0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True, kw_only=True)
class Element:
    """One element type.

    Args:
        bits: Code width.
        values: Value of each code [2^bits]; infinities and NaN are never rounded to.
        exponent_bits: E; 0 for integers.
        mantissa_bits: M; bits after the point of integers.
        bias: b; 0 for integers.
    """

    bits: int
    values: tuple[float, ...]
    exponent_bits: int
    mantissa_bits: int
    bias: int = 0

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return max(value for value in self.values if math.isfinite(value))


def make_float(exponent_bits: int, mantissa_bits: int, bias: int, special: str = "") -> Element:
    """Returns a float of 1 + exponent_bits + mantissa_bits bits.

    Args:
        exponent_bits: E, at least 1.
        mantissa_bits: M.
        bias: b.
        special: ``nan`` where the last code of a sign is NaN, ``ieee`` where the last exponent is infinity and NaN.
    """

    def value(code: int) -> float:
        sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
        mantissa, exponent = code & ((1 << mantissa_bits) - 1), (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
        if special == "nan" and (code + 1) % (1 << (exponent_bits + mantissa_bits)) == 0:
            return math.nan
        if special == "ieee" and exponent == (1 << exponent_bits) - 1:
            return math.nan if mantissa else sign * math.inf
        whole = mantissa if exponent == 0 else mantissa + (1 << mantissa_bits)
        return sign * math.ldexp(whole, max(exponent, 1) - bias - mantissa_bits)

    bits = 1 + exponent_bits + mantissa_bits
    return Element(
        bits=bits,
        values=tuple(map(value, range(1 << bits))),
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
        bias=bias,
    )


def _make_integer(bits: int, fraction_bits: int) -> Element:
    half = 1 << (bits - 1)
    return Element(
        bits=bits,
        values=tuple(math.ldexp((code ^ half) - half, -fraction_bits) for code in range(1 << bits)),
        exponent_bits=0,
        mantissa_bits=fraction_bits,
    )


_MAKERS: dict[str, Callable[[], Element]] = {
    "e2m1": partial(make_float, 2, 1, 1),
    "e2m3": partial(make_float, 2, 3, 1),
    "e3m2": partial(make_float, 3, 2, 3),
    "e4m3": partial(make_float, 4, 3, 7, "nan"),
    "e5m2": partial(make_float, 5, 2, 15, "ieee"),
    "int4": partial(_make_integer, 4, 0),
    "int8": partial(_make_integer, 8, 6),
}
ELEMENTS: dict[str, Element] = {name: make() for name, make in _MAKERS.items()}
