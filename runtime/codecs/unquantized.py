"""The 16-bit types: every weight rounded to the nearest, nothing beside it."""

import torch
from torch import Tensor

from runtime.codecs.codec import Codec, StoredTensors, pick
from runtime.storage import Format


def encode_unquantized(weight: Tensor, format_: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Returns ``values`` [out_features, in_features] in the type of the format.

    Raises:
        ValueError: If a weight is not finite, or outside the range of the format.
    """
    values = weight.to(getattr(torch, format_.element))
    if not bool(torch.isfinite(values).all()):
        msg = (
            f"weights must be finite and in the range of format '{format_.name}': got "
            f"max|w|={weight.abs().max().item():g}. Check the weight for huge values; bf16 has the widest range."
        )
        raise ValueError(msg)
    return {"values": values}


def decode_unquantized(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the values as float32."""
    return pick(tensors["values"], rows).to(torch.float32)


def unquantized_codes(
    tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None
) -> Tensor:
    """Returns the bit patterns of the values."""
    return pick(tensors["values"], rows).view(torch.int16)


UNQUANTIZED = Codec(
    encode=encode_unquantized, decode=decode_unquantized, codes=unquantized_codes, reads_importance=False
)
