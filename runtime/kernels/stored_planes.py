"""The planes that the CPU kernels read of a weight as it is stored, at the width that it is read at.

int, binary       one plane
element           floats of 8 bits: one plane
double_rounding   scale (prefix + rest / 2^rest_bits): the rest at the full width alone
nested            scale_b sum_p 2^(b - p) (codes_p - (2^bits_p - 1) / 2) over the widths p up to b, with bits_p codes
                  each: the middles of the parts add up to the middle of the whole
column_mixture    the wide columns and the narrow ones, each an integer or one-bit weight
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from runtime.codecs.codec import StoredTensors
from runtime.codecs.column_mixture import list_column_parts, part_of, read_column_mask
from runtime.formats import Format
from runtime.kernels.matrices import ColumnPart, StoredMatrix

# Floats of 8 bits that the kernels read, and how scales of them are stored.
_SMALL_FLOATS, _SMALL_FLOAT_SCALES = ("e4m3", "e5m2"), ("fp16", "e8m0")


class Packed(Protocol):
    """What is read of a packed weight."""

    format: Format
    width: int
    shape: tuple[int, int]
    _buffers: dict[str, Tensor | None]

    def __call__(self, rows: Tensor | None = None) -> Tensor: ...


def has_stored_planes(format_: Format) -> bool:
    """Returns True where ``stored_planes`` knows a format."""
    if format_.mixture is not None:
        parts = format_.mixture.wide, format_.mixture.narrow
        return format_.kind == "column_mixture" and all(map(has_codes, parts))
    if format_.kind == "element":
        return format_.element in _SMALL_FLOATS and format_.scale_type in _SMALL_FLOAT_SCALES
    return format_.kind in _PLANES and format_.scale_type == "fp16"


def has_codes(format_: Format) -> bool:
    """Returns True for integers and one bit with scales in float16."""
    return format_.kind in ("int", "binary") and format_.scale_type == "fp16"


def stored_planes(weight: Packed) -> list[StoredMatrix]:
    """Returns the planes of a weight whose format ``has_stored_planes``.

    Raises:
        ValueError: If the mask of a mixture does not name as many columns as its parts hold.
    """
    return _PLANES[weight.format.kind](weight)


def stored_matrix(weight: Packed) -> StoredMatrix:
    """Returns the one plane of a weight whose format ``has_codes``."""
    (plane,) = stored_planes(weight)
    return plane


def _tensor(weight: Packed, name: str) -> Tensor:
    tensor = weight._buffers[name]
    assert tensor is not None
    return tensor


def _list_one(weight: Packed) -> list[StoredMatrix]:
    return [_describe_codes(_tensors(weight), weight.format, weight.shape[1])]


def _tensors(weight: Packed) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weight._buffers.items() if tensor is not None}


def _describe_codes(tensors: StoredTensors, format_: Format, columns: int) -> StoredMatrix:
    """Returns the plane of a weight, or of a part of one, whose format ``has_codes``."""
    codes = tensors["codes"]
    if format_.kind == "int":
        return StoredMatrix(codes, tensors["scale"], tensors.get("zero_point"), format_.bits, columns)
    if format_.symmetric:
        # -scale, scale
        return StoredMatrix(codes, tensors["scale"], None, 1, columns, centre=0.5, factor=2.0)
    return StoredMatrix(codes, tensors["high"], tensors["low"], 1, columns, element="two_values")


def _list_small_floats(weight: Packed) -> list[StoredMatrix]:
    codes, scale, element = _tensor(weight, "codes"), _tensor(weight, "scale"), weight.format.element
    return [StoredMatrix(codes, scale, None, 8, weight.shape[1], element=element)]


def _list_double_rounding(weight: Packed) -> list[StoredMatrix]:
    format_, columns, scale = weight.format, weight.shape[1], _tensor(weight, "scale")
    prefix = StoredMatrix(_tensor(weight, "codes"), scale, None, format_.prefix_bits, columns)
    if weight.width < format_.bits:
        return [prefix]
    factor = 2.0**-format_.rest_bits
    return [prefix, StoredMatrix(_tensor(weight, "codes_rest"), scale, None, format_.rest_bits, columns, factor=factor)]


def _list_nested(weight: Packed) -> list[StoredMatrix]:
    scale, planes, read_bits = _tensor(weight, f"scale_{weight.width}"), [], 0
    for width in (w for w in weight.format.widths if w <= weight.width):
        bits, factor = width - read_bits, 2.0 ** (weight.width - width)
        codes, centre = _tensor(weight, f"codes_{width}"), ((1 << bits) - 1) / 2
        planes.append(StoredMatrix(codes, scale, None, bits, weight.shape[1], centre=centre, factor=factor))
        read_bits = width
    return planes


def _list_column_parts(weight: Packed) -> list[StoredMatrix]:
    tensors, planes = _tensors(weight), []
    for name, part, columns in list_column_parts(weight.format, read_column_mask(tensors, weight.shape)):
        plane = _describe_codes(part_of(tensors, name), part, len(columns))
        held = part.stored_tensors((weight.shape[0], len(columns)))[0].shape
        if plane.codes.shape != held:
            msg = (
                f"the mask of a mixture must name the columns that its parts hold: got {len(columns)} of the {name} "
                f"part for codes of shape {tuple(plane.codes.shape)}, in a weight of shape {weight.shape}. "
                "Load the checkpoint again."
            )
            raise ValueError(msg)
        planes.append(plane._replace(part=ColumnPart(columns.to(torch.int32), weight.shape[1])))
    return planes


_PLANES: dict[str, Callable[[Packed], list[StoredMatrix]]] = {
    "int": _list_one,
    "binary": _list_one,
    "element": _list_small_floats,
    "double_rounding": _list_double_rounding,
    "nested": _list_nested,
    "column_mixture": _list_column_parts,
}
