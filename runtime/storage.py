"""A format as a value, and the tensors that a weight is stored as: one truth for names, types, shapes and bytes.

``LAYOUTS`` says for each kind of format which tensors hold a weight [out_features, in_features]. The packer fills
them, the checkpoint writes them, and their bytes are what a budget counts. Codes are, row by row, a dense
little-endian bit stream; each row starts on a byte.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from runtime.ggml_blocks import GGML_BLOCKS
from runtime.stored_tensor import StoredTensor, packed_row_bytes, trit_row_bytes

Shape = tuple[int, int]
# How the names of tensors that hold codes begin; the others are metadata.
CODE_TENSORS = ("codes", "values")
# Widths that a nested weight can be read at, each a prefix of the next.
NESTED_WIDTHS = (4, 6, 8)
# Bits that say of each group which type of a menu its elements have.
SELECTOR_BITS = {"bitmod": 2, "int_or_float": 1}
# Rows that have their wide groups in the same places, so that a tile of a kernel reads one width at a time.
ROWS_OF_A_MASK = 16
# The place of an outlier in its row takes two bytes.
MOST_OUTLIER_COLUMNS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Two formats inside one matrix, one for some of its columns or groups and one for the rest.

    Args:
        wide: Format of the chosen ones, with the group size of the whole.
        narrow: Format of the others.
        wide_share: Share of the chosen ones, below one half.
        outlier_share: Share of the weights in narrow groups that are stored apart, as 16-bit floats.
    """

    wide: "Format"
    narrow: "Format"
    wide_share: float
    outlier_share: float = 0.0

    def wide_count(self, count: int) -> int:
        """Returns how many of ``count`` columns or groups are wide: the share of them, rounded."""
        return _rounded(self.wide_share * count)

    def outlier_count(self, count: int) -> int:
        """Returns the number of outliers among the ``count`` narrow weights of a row."""
        return _rounded(self.outlier_share * count)


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one weight is stored.

    Args:
        name: Key in ``FORMATS``, such as ``int4_g64``.
        kind: Family, a key of ``LAYOUTS`` and of ``CODECS``.
        bits: Nominal code width in bits.
        group_size: Weights of one row that share a scale or a block; None means the whole row (per channel).
        symmetric: True when there is no zero point: zero, or the middle between two codes, is fixed.
        scale_type: How a scale is stored: ``fp16``, or a type that the family names.
        element: Type of the elements where codes are no plain integers, such as ``e2m1`` or ``q4_0``.
        mixture: The two formats of a family that mixes widths; ``bits`` is then the width of most codes.
        rank: Rank of the magnitudes in a family that stores these as a product of two matrices.
        prefix_bits: Width of the part of a code that is a weight by itself, in the family that stores it apart.
    """

    name: str
    kind: str
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    scale_type: str = "fp16"
    element: str = ""
    mixture: Mixture | None = None
    rank: int = 0
    prefix_bits: int = 0

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that the stored weight can be read at, the full one last."""
        prefix = (self.prefix_bits,) if self.prefix_bits else ()
        return NESTED_WIDTHS if self.kind == "nested" else (*prefix, self.bits)

    @property
    def rest_bits(self) -> int:
        """Bits of a code behind the part that is a weight by itself."""
        return self.bits - self.prefix_bits

    @property
    def unquantized(self) -> bool:
        """True for the 16-bit types, which models are trained and published in."""
        return self.kind == "float"

    def refusal(self, in_features: int) -> str | None:
        """Returns why a row of ``in_features`` weights cannot be stored in this format; None when it can."""
        if self.group_size is not None and in_features % self.group_size != 0:
            return f"group_size={self.group_size} does not divide in_features={in_features}"
        if self.mixture is not None and self.mixture.outlier_share > 0 and in_features > MOST_OUTLIER_COLUMNS:
            return f"outliers are found in up to {MOST_OUTLIER_COLUMNS} columns, in_features={in_features}"
        return None

    def fits(self, in_features: int) -> bool:
        """Returns True when a row of ``in_features`` weights can be stored in this format."""
        return self.refusal(in_features) is None

    def group_count(self, in_features: int) -> int:
        """Returns the number of groups in a row of ``in_features`` weights.

        Raises:
            ValueError: If the group size does not divide the row.
        """
        if self.group_size is not None and in_features % self.group_size != 0:
            msg = (
                f"group_size must divide in_features: got group_size={self.group_size}, "
                f"in_features={in_features} in format '{self.name}'. Use another group size or a channel format."
            )
            raise ValueError(msg)
        return in_features // (self.group_size or in_features)

    def stored_tensors(self, shape: Shape) -> tuple[StoredTensor, ...]:
        """Returns the tensors that hold a weight of shape (out_features, in_features).

        Raises:
            ValueError: If the group size does not divide the row.
        """
        return LAYOUTS[self.kind](self, shape)

    def storage_bytes(self, shape: Shape) -> int:
        """Returns the exact bytes of a weight (out_features, in_features): codes, scales, zero points, padding.

        Raises:
            ValueError: If the group size does not divide the row.
        """
        return sum(tensor.nbytes for tensor in self.stored_tensors(shape))

    def code_bytes(self, shape: Shape) -> int:
        """Returns the bytes of the codes of a weight (out_features, in_features) alone, each row's padding included.

        Raises:
            ValueError: If the group size does not divide the row.
        """
        tensors = self.stored_tensors(shape)
        if self.kind == "ggml":
            # Codes lie in the blocks, between scales, without padding.
            return prod(shape) * self.bits // 8
        return sum(tensor.nbytes for tensor in tensors if tensor.name.startswith(CODE_TENSORS))


def _rounded(number: float) -> int:
    return int(number + 0.5)


def _codes(format_: Format, shape: Shape) -> StoredTensor:
    return StoredTensor("codes", (shape[0], packed_row_bytes(shape[1], format_.bits)), "uint8")


def _lay_out_unquantized(format_: Format, shape: Shape) -> tuple[StoredTensor, ...]:
    return (StoredTensor("values", shape, format_.element),)


def _lay_out_integer(format_: Format, shape: Shape) -> tuple[StoredTensor, ...]:
    rows, groups = shape[0], format_.group_count(shape[1])
    tensors = (_codes(format_, shape), StoredTensor("scale", (rows, groups), _SCALE_DTYPES[format_.scale_type]))
    if format_.symmetric:
        return tensors
    return (*tensors, StoredTensor("zero_point", (rows, packed_row_bytes(groups, format_.bits)), "uint8"))


def _lay_out_binary(format_: Format, shape: Shape) -> tuple[StoredTensor, ...]:
    values = (shape[0], format_.group_count(shape[1]))
    if format_.symmetric:
        return (_codes(format_, shape), StoredTensor("scale", values, _SCALE_DTYPES[format_.scale_type]))
    return (_codes(format_, shape), StoredTensor("low", values, "float16"), StoredTensor("high", values, "float16"))


def _lay_out_elements(format_: Format, shape: Shape) -> tuple[StoredTensor, ...]:
    scale = StoredTensor("scale", (shape[0], format_.group_count(shape[1])), _SCALE_DTYPES[format_.scale_type])
    if format_.scale_type != "e4m3":
        return (_codes(format_, shape), scale)
    return (_codes(format_, shape), scale, StoredTensor("scale_unit", (1,), "float32"))


def _lay_out_searched_float(format_: Format, shape: Shape) -> tuple[StoredTensor, ...]:
    scale = StoredTensor("scale", (shape[0], format_.group_count(shape[1])), "float16")
    return (_codes(format_, shape), scale, StoredTensor("exponent", (shape[0],), "uint8"))


def _lay_out_ggml(format_: Format, shape: Shape) -> tuple[StoredTensor, ...]:
    row_bytes = format_.group_count(shape[1]) * GGML_BLOCKS[format_.element][1]
    return (StoredTensor("blocks", (shape[0], row_bytes), "uint8"),)


def _lay_out_ternary(format_: Format, shape: Shape) -> tuple[StoredTensor, ...]:
    codes = StoredTensor("codes", (shape[0], trit_row_bytes(shape[1])), "uint8")
    return (codes, StoredTensor("scale", (shape[0], format_.group_count(shape[1])), "float16"))


def _lay_out_chosen_type(format_: Format, shape: Shape) -> tuple[StoredTensor, ...]:
    groups = format_.group_count(shape[1])
    selector = StoredTensor("selector", (shape[0], packed_row_bytes(groups, SELECTOR_BITS[format_.element])), "uint8")
    return (_codes(format_, shape), StoredTensor("scale", (shape[0], groups), "float16"), selector)


def _lay_out_planes(format_: Format, shape: Shape) -> tuple[StoredTensor, ...]:
    scales = (shape[0], format_.group_count(shape[1]), format_.bits)
    return (_codes(format_, shape), StoredTensor("scale", scales, _SCALE_DTYPES[format_.scale_type]))


def _lay_out_nested(format_: Format, shape: Shape) -> tuple[StoredTensor, ...]:
    tensors, groups, read_bits = [], format_.group_count(shape[1]), 0
    for width in NESTED_WIDTHS:
        row_bytes = packed_row_bytes(shape[1], width - read_bits)
        tensors.append(StoredTensor(f"codes_{width}", (shape[0], row_bytes), "uint8"))
        tensors.append(StoredTensor(f"scale_{width}", (shape[0], groups), "float16"))
        read_bits = width
    return tuple(tensors)


def _lay_out_double_rounding(format_: Format, shape: Shape) -> tuple[StoredTensor, ...]:
    return (
        StoredTensor("codes", (shape[0], packed_row_bytes(shape[1], format_.prefix_bits)), "uint8"),
        StoredTensor("codes_rest", (shape[0], packed_row_bytes(shape[1], format_.rest_bits)), "uint8"),
        StoredTensor("scale", (shape[0], format_.group_count(shape[1])), "float16"),
    )


def _lay_out_residual_blocks(format_: Format, shape: Shape) -> tuple[StoredTensor, ...]:
    blocks, rank = format_.bits, min(format_.rank, *shape)
    return (
        StoredTensor("codes", (blocks, shape[0], packed_row_bytes(shape[1], 1)), "uint8"),
        StoredTensor("left", (blocks, shape[0], rank), "float16"),
        StoredTensor("right", (blocks, rank, shape[1]), "float16"),
    )


def _lay_out_part(part_name: str, part: Format, shape: Shape) -> tuple[StoredTensor, ...]:
    if shape[1] == 0:
        return ()
    return tuple(StoredTensor(f"{t.name}_{part_name}", t.shape, t.dtype) for t in part.stored_tensors(shape))


def _lay_out_column_mixture(format_: Format, shape: Shape) -> tuple[StoredTensor, ...]:
    assert format_.mixture is not None
    length = format_.group_size or 1
    wide = format_.mixture.wide_count(shape[1] // length) * length
    parts = (
        *_lay_out_part("wide", format_.mixture.wide, (shape[0], wide)),
        *_lay_out_part("narrow", format_.mixture.narrow, (shape[0], shape[1] - wide)),
    )
    return (StoredTensor("mask", (packed_row_bytes(shape[1], 1),), "uint8"), *parts) if wide else parts


def _lay_out_group_mixture(format_: Format, shape: Shape) -> tuple[StoredTensor, ...]:
    assert format_.mixture is not None
    groups = format_.group_count(shape[1])
    length = shape[1] // groups
    wide = format_.mixture.wide_count(groups)
    tensors = (
        StoredTensor("mask", (-(-shape[0] // ROWS_OF_A_MASK), packed_row_bytes(groups, 1)), "uint8"),
        *_lay_out_part("wide", format_.mixture.wide, (shape[0], wide * length)),
        *_lay_out_part("narrow", format_.mixture.narrow, (shape[0], (groups - wide) * length)),
    )
    outliers = format_.mixture.outlier_count((groups - wide) * length)
    if not outliers:
        return tensors
    index = StoredTensor("outlier_index", (shape[0], outliers, 2), "uint8")
    return (*tensors, index, StoredTensor("outlier", (shape[0], outliers), "float16"))


# A power of two is stored as its exponent, with an offset of 127 in E8M0; an E4M3 float as its byte.
_SCALE_DTYPES = {"fp16": "float16", "pow2": "int8", "e8m0": "uint8", "e4m3": "uint8"}

LAYOUTS: dict[str, Callable[[Format, Shape], tuple[StoredTensor, ...]]] = {
    "float": _lay_out_unquantized,
    "int": _lay_out_integer,
    "binary": _lay_out_binary,
    "element": _lay_out_elements,
    "searched_float": _lay_out_searched_float,
    "ggml": _lay_out_ggml,
    "ternary": _lay_out_ternary,
    "chosen_type": _lay_out_chosen_type,
    "planes": _lay_out_planes,
    "nested": _lay_out_nested,
    "double_rounding": _lay_out_double_rounding,
    "residual_blocks": _lay_out_residual_blocks,
    "column_mixture": _lay_out_column_mixture,
    "group_mixture": _lay_out_group_mixture,
}
