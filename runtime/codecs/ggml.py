"""llama.cpp's block formats, stored as exactly the bytes that a GGUF file holds.

The layouts are in ``ggml_layouts.py``, the search for the scales in ``ggml_search.py``. What is read back is bit for
bit what ``gguf.quants.dequantize`` makes of the same bytes.
"""

from dataclasses import replace

import torch
from torch import Tensor

from runtime.codecs.codec import Codec, ColumnGrid, StoredTensors, check_range, pick
from runtime.codecs.ggml_layouts import GGML_LAYOUTS
from runtime.codecs.ggml_search import part_steps, search_blocks, values_of
from runtime.quantizers.grid import LARGEST_SCALE
from runtime.storage import Format

# Temporaries of this many weights stay in the processor's cache.
_CHUNK_WEIGHTS = 1 << 18


def encode_ggml(weight: Tensor, format_: Format, importance: Tensor | None = None) -> dict[str, Tensor]:
    """Returns ``blocks`` [out_features, bytes of a row].

    Raises:
        ValueError: If the block does not divide the row, or a weight is not finite or beyond float16.
    """
    check_range(weight, format_, LARGEST_SCALE)
    layout, in_features = GGML_LAYOUTS[format_.element], weight.shape[1]
    shape = (format_.group_count(in_features), layout.parts, -1)
    h = torch.ones(1, 1, 1, 1) if importance is None else importance.view(1, *shape)
    rows = max(1, _CHUNK_WEIGHTS // in_features)
    chunks = []
    for chunk in torch.split(weight, rows):
        blocks = chunk.reshape(len(chunk), *shape)
        fields = search_blocks(blocks.flatten(0, 1), h.expand_as(blocks).flatten(0, 1), layout)
        chunks.append(layout.pack(fields).view(len(chunk), -1))
    return {"blocks": torch.cat(chunks)}


def decode_ggml(tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None) -> Tensor:
    """Returns the values of the blocks."""
    blocks, layout = _blocks(tensors, format_, shape, rows), GGML_LAYOUTS[format_.element]
    return values_of(layout.unpack(blocks), layout).flatten(1)


def ggml_codes(tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None = None) -> Tensor:
    """Returns the codes as uint8."""
    return GGML_LAYOUTS[format_.element].unpack(_blocks(tensors, format_, shape, rows)).codes.flatten(1)


def ggml_grid(tensors: StoredTensors, format_: Format, shape: tuple[int, int]) -> ColumnGrid:
    """Returns the steps and minima of each column's parts of blocks."""
    layout = GGML_LAYOUTS[format_.element]
    fields = layout.unpack(_blocks(tensors, format_, shape, None))
    step, least = (None if part is None else part.flatten(1).T.contiguous() for part in part_steps(fields))
    assert step is not None
    length = shape[1] // len(step)

    def round_column(j: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        k = j // length
        shifted = numbers if least is None else numbers + least[k]
        levels = layout.nearest(shifted, step[k])
        values = levels * step[k] if least is None else levels * step[k] - least[k]
        return layout.codes(levels), values

    def with_codes(codes: Tensor) -> dict[str, Tensor]:
        return {"blocks": layout.pack(replace(fields, codes=codes.view(fields.codes.shape))).flatten(1)}

    return ColumnGrid(round_column=round_column, with_codes=with_codes)


def _blocks(tensors: StoredTensors, format_: Format, shape: tuple[int, int], rows: Tensor | None) -> Tensor:
    picked = pick(tensors["blocks"], rows)
    return picked.view(len(picked), format_.group_count(shape[1]), -1)


GGML = Codec(encode=encode_ggml, decode=decode_ggml, codes=ggml_codes, grid=ggml_grid)
