"""Formats as llama.cpp's types: which format is stored as which, and its bytes in a GGUF file.

Formats of the kind ``ggml`` are llama.cpp's own and their tensors are its bytes. Four others are stored without
changing a number: codes of 4, 5 and 8 bits with one float16 scale for 32 weights and no zero point,

    value = scale * (code - 2^(bits-1)),

are Q4_0, Q5_0 and Q8_0, and MXFP4 is MXFP4: E2M1 codes with a byte of exponent for 32 weights. A block holds the scale
first, then the codes: of 4 and 5 bits the low four bits of weights j and j + 16 in one byte, and of 5 bits before them
the fifth bits of all 32 as one little-endian word.
"""

import torch
from torch import Tensor

from runtime.formats import Format
from runtime.packing import unpack_codes

_SAME_AS = {
    "int4_g32_sym": "Q4_0",
    "int5_g32_sym": "Q5_0",
    "int8_g32_sym": "Q8_0",
    "mxfp4": "MXFP4",
    "fp16": "F16",
    "bf16": "BF16",
}
_BLOCK = 32


def gguf_type(format_: Format) -> str | None:
    """Returns the name of the llama.cpp type that holds a format bit for bit, or None if there is none."""
    return format_.element.upper() if format_.kind == "ggml" else _SAME_AS.get(format_.name)


def gguf_bytes(stored: dict[str, Tensor], format_: Format) -> Tensor:
    """Returns the bytes [out_features, bytes of a row] of a weight in a GGUF file.

    Args:
        stored: Tensors of ``format_.stored_tensors``.
        format_: A format with a ``gguf_type``.
    """
    if format_.kind == "ggml":
        return stored["blocks"]
    if format_.unquantized:
        return stored["values"].contiguous().view(torch.uint8)
    scale = stored["scale"]
    rows, groups = scale.shape
    codes = unpack_codes(stored["codes"], format_.bits, groups * _BLOCK).view(rows, groups, _BLOCK)
    # The scale's own bytes: two of a half, one of an exponent.
    head = scale.contiguous().view(torch.uint8).view(rows, groups, -1)
    return torch.cat([head, _code_bytes(codes, format_.bits)], dim=-1).view(rows, -1)


def _code_bytes(codes: Tensor, bits: int) -> Tensor:
    """Returns the bytes [rows, groups, n] of codes [rows, groups, 32]."""
    if bits == 8:
        # Signed there: 128, which stands for zero, becomes 0.
        return codes ^ 128
    low = codes & 15
    nibbles = low[..., : _BLOCK // 2] | (low[..., _BLOCK // 2 :] << 4)
    if bits == 4:
        return nibbles
    fifth = (codes >> 4).view(*codes.shape[:-1], _BLOCK // 8, 8)
    weights = (1 << torch.arange(8, dtype=torch.uint8)).to(torch.uint8)
    return torch.cat([(fifth * weights).sum(dim=-1, dtype=torch.uint8), nibbles], dim=-1)
