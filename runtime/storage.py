"""A format as a value, and the tensors that a weight is stored as: one truth for names, types, shapes and bytes.

``LAYOUTS`` says for each kind of format which tensors hold a weight [out_features, in_features]. The packer fills
them, the checkpoint writes them, and their bytes are what a budget counts. Codes are, row by row, a dense
little-endian bit stream; each row starts on a byte.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

Shape = tuple[int, int]
# Bytes of one number, by the names that torch gives the types.
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int8": 1}
# How the names of tensors that hold codes begin; the others are metadata.
CODE_TENSORS = ("codes", "values")
# Bytes of a block of llama.cpp's formats: 32 weights, 256 of those that end in k.
GGML_BLOCKS = {
    "q4_0": 18,
    "q4_1": 20,
    "q5_0": 22,
    "q5_1": 24,
    "q8_0": 34,
    "q2_k": 84,
    "q3_k": 110,
    "q4_k": 144,
    "q5_k": 176,
    "q6_k": 210,
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a stored weight.

    Args:
        name: Name of the buffer, unique within the weight; it ends the tensor's name in the checkpoint.
        shape: Its shape.
        dtype: Name of its type in torch, a key of ``ITEM_BYTES``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


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
    """

    name: str
    kind: str
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    scale_type: str = "fp16"
    element: str = ""

    @property
    def unquantized(self) -> bool:
        """True for the 16-bit types, which models are trained and published in."""
        return self.kind == "float"

    def refusal(self, in_features: int) -> str | None:
        """Returns why a row of ``in_features`` weights cannot be stored in this format; None when it can."""
        if self.group_size is None or in_features % self.group_size == 0:
            return None
        return f"group_size={self.group_size} does not divide in_features={in_features}"

    def fits(self, in_features: int) -> bool:
        """Returns True when a row of ``in_features`` weights can be stored in this format."""
        return self.refusal(in_features) is None

    def group_count(self, in_features: int) -> int:
        """Returns the number of groups in a row of ``in_features`` weights.

        Raises:
            ValueError: If the group size does not divide the row.
        """
        if not self.fits(in_features):
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


def packed_row_bytes(count: int, bits: int) -> int:
    """Returns the bytes of ``count`` codes of ``bits`` bits, padded to a whole byte."""
    return (count * bits + 7) // 8


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
    row_bytes = format_.group_count(shape[1]) * GGML_BLOCKS[format_.element]
    return (StoredTensor("blocks", (shape[0], row_bytes), "uint8"),)


# A power of two is stored as its exponent, with an offset of 127 in E8M0; an E4M3 float as its byte.
_SCALE_DTYPES = {"fp16": "float16", "pow2": "int8", "e8m0": "uint8", "e4m3": "uint8"}

LAYOUTS: dict[str, Callable[[Format, Shape], tuple[StoredTensor, ...]]] = {
    "float": _lay_out_unquantized,
    "int": _lay_out_integer,
    "binary": _lay_out_binary,
    "element": _lay_out_elements,
    "searched_float": _lay_out_searched_float,
    "ggml": _lay_out_ggml,
}
