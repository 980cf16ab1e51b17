"""Storage formats: how a weight matrix is written, and exactly how many bytes that takes.

A weight of shape [out_features, in_features] stored as an integer format is, row by row, a dense
little-endian bit stream of codes (each row starts on a byte), one float16 scale per group and, when
asymmetric, one zero point of the code's own width per group, packed the same way.

Four different numbers are called "bits": ``Format.bits`` is the nominal code width; entropy plays no
part here; packed bits are the codes alone; budgets use ``storage_bytes``, which counts codes, scales,
zero points and the padding of every row.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

SCALE_BYTES = 2  # float16
INTEGER_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128, None)


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one weight is stored.

    Args:
        name: Key in ``FORMATS``, such as ``int4_g64``.
        kind: ``int`` for grouped integer codes, ``float`` for an unquantized 16-bit type.
        bits: Code width in bits.
        group_size: Weights of one row that share a scale; None means the whole row (per channel).
        symmetric: True when there is no zero point: code 2^(bits-1) stands for zero.
    """

    name: str
    kind: Literal["int", "float"]
    bits: int
    group_size: int | None = None
    symmetric: bool = True

    def group_count(self, in_features: int) -> int:
        """Returns the number of groups in a row of ``in_features`` weights.

        Raises:
            ValueError: If the group size does not divide the row.
        """
        if self.group_size is None:
            return 1
        if in_features % self.group_size:
            msg = (
                f"group_size must divide in_features: got group_size={self.group_size}, "
                f"in_features={in_features} in format '{self.name}'. Use another group size or a channel format."
            )
            raise ValueError(msg)
        return in_features // self.group_size

    def fits(self, in_features: int) -> bool:
        """Returns True when a row of ``in_features`` weights can be stored in this format."""
        return self.group_size is None or in_features % self.group_size == 0

    def storage_bytes(self, shape: tuple[int, int]) -> int:
        """Returns the exact bytes of a weight [out_features, in_features]: codes, scales, zero points, padding.

        Raises:
            ValueError: If the group size does not divide the row.
        """
        out_features, in_features = shape
        if self.kind == "float":
            return out_features * in_features * self.bits // 8
        groups = self.group_count(in_features)
        zero_points = 0 if self.symmetric else packed_row_bytes(groups, self.bits)
        return out_features * (packed_row_bytes(in_features, self.bits) + groups * SCALE_BYTES + zero_points)


def packed_row_bytes(count: int, bits: int) -> int:
    """Returns the bytes of ``count`` codes of ``bits`` bits, padded to a whole byte."""
    return (count * bits + 7) // 8


def _integer_format(bits: int, group_size: int | None, symmetric: bool) -> Format:
    group = "channel" if group_size is None else f"g{group_size}"
    name = f"int{bits}_{group}" + ("_sym" if symmetric else "")
    return Format(name=name, kind="int", bits=bits, group_size=group_size, symmetric=symmetric)


FORMATS: dict[str, Format] = {
    **{
        f.name: f
        for f in (
            _integer_format(bits, group_size, symmetric)
            for bits in INTEGER_BITS
            for group_size in GROUP_SIZES
            for symmetric in (False, True)
        )
    },
    "bf16": Format(name="bf16", kind="float", bits=16),
    "fp16": Format(name="fp16", kind="float", bits=16),
}

DEFAULT_FORMATS = ("int2_g64", "int3_g64", "int4_g64", "int5_g64", "int6_g64", "int8_g64", "bf16")


def find_format(name: str) -> Format:
    """Returns the format called ``name``.

    Raises:
        ValueError: If there is none; the message lists the known names.
    """
    if name not in FORMATS:
        msg = f"format must be a known name: got '{name}'. Known formats: {', '.join(sorted(FORMATS))}."
        raise ValueError(msg)
    return FORMATS[name]


def find_formats(names: Iterable[str]) -> tuple[Format, ...]:
    """Returns the formats of ``names``, in order.

    Raises:
        ValueError: If a name is unknown or named twice, or there is no name at all.
    """
    formats = tuple(find_format(name) for name in names)
    if not formats or len({f.name for f in formats}) != len(formats):
        msg = f"formats must name at least one format, each once: got {[f.name for f in formats]}. Remove the repeats."
        raise ValueError(msg)
    return formats
