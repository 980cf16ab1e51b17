"""One tensor of a stored weight as a value, and the bytes of a row of packed codes."""

from dataclasses import dataclass
from math import prod

# Bytes of one number, by the names that torch gives the types.
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1, "int8": 1}


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


def packed_row_bytes(count: int, bits: int) -> int:
    """Returns the bytes of ``count`` codes of ``bits`` bits, padded to a whole byte."""
    return (count * bits + 7) // 8


def trit_row_bytes(count: int) -> int:
    """Returns the bytes of ``count`` digits of three values, five to a byte."""
    return (count + 4) // 5
