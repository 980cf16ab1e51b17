"""What a family of formats has to offer: from a weight to its stored tensors and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from runtime.storage import Format

StoredTensors = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Codec:
    """The encoder and the decoder of one kind of format.

    Args:
        encode: (weight [out_features, in_features] float32, format, importance [in_features] or None) -> the tensors of
            ``format.stored_tensors``, by name. The importance is the diagonal of the second moment of the weight's
            inputs: what the squared error of each column counts. None counts all alike. Raises ValueError for a weight
            that the format cannot hold.
        decode: (tensors, format, (out_features, in_features), row indices [n] or None for all rows) -> the float32
            weight [n, in_features]. Each row depends on its index alone, not on the others asked for.
        codes: The same arguments as ``decode`` -> the codes [n, in_features], integers of any type.
        reads_importance: Whether the encoder uses it.
    """

    encode: Callable[[Tensor, Format, Tensor | None], dict[str, Tensor]]
    decode: Callable[[StoredTensors, Format, tuple[int, int], Tensor | None], Tensor]
    codes: Callable[[StoredTensors, Format, tuple[int, int], Tensor | None], Tensor]
    reads_importance: bool = True


def pick(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """Returns the rows [n] of a tensor; all of them for None."""
    return tensor if rows is None else tensor[rows]
