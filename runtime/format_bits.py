"""The four kinds of bits of a format, and what it does to a weight.

- nominal: the width of a code, which names the format;
- entropy: what an ideal coder would need for the codes of a given weight, -sum p log2 p over how often each occurs;
- packed: the codes as they are stored, with the padding of each row;
- stored: everything that is stored, scales and other metadata included. Budgets count these.

All in bits per weight.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.codecs import CODECS
from runtime.rendering import encode
from runtime.storage import Format


@dataclass(frozen=True, kw_only=True)
class FormatBits:
    """Bits per weight of one format for one shape.

    Args:
        nominal: Width of a code.
        packed: Codes with padding.
        stored: Codes, padding and metadata.
        entropy: Of the codes of a weight; None without one.
        relative_error: ||W - rendered W|| / ||W||; None without a weight.
    """

    nominal: int
    packed: float
    stored: float
    entropy: float | None = None
    relative_error: float | None = None


def describe_format(
    format_: Format, shape: tuple[int, int], weight: Tensor | None = None, *, quantizer: str = "rtn"
) -> FormatBits:
    """Returns the bits per weight of a format.

    Args:
        format_: The format.
        shape: (out_features, in_features).
        weight: A weight of this shape; None for none.
        quantizer: Name in ``QUANTIZERS`` of one that reads the weight alone, for integer formats.

    Raises:
        ValueError: If the group size does not divide the row, the quantizer is unknown or needs statistics, or the
            weight cannot be stored.
    """
    count = shape[0] * shape[1]
    packed, stored = (8 * total / count for total in (format_.code_bytes(shape), format_.storage_bytes(shape)))
    if weight is None:
        return FormatBits(nominal=format_.bits, packed=packed, stored=stored)
    codec, tensors = CODECS[format_.kind], encode(weight, format_, quantizer)
    rendered = codec.decode(tensors, format_, shape, None)
    norm = float(weight.double().norm())
    return FormatBits(
        nominal=format_.bits,
        packed=packed,
        stored=stored,
        entropy=code_entropy(codec.codes(tensors, format_, shape, None)),
        relative_error=float((rendered.double() - weight.double()).norm()) / norm if norm else 0.0,
    )


def code_entropy(codes: Tensor) -> float:
    """Returns the empirical entropy of integer codes of any shape, in bits."""
    _, counts = torch.unique(codes, return_counts=True)
    shares = counts.double() / codes.numel()
    return abs(float((shares * shares.log2()).sum()))
