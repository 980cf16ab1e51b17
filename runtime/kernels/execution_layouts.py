"""Execution layouts of weights that the CPU kernels cannot read as they are stored.

    levels    formats whose values are multiples of steps (``runtime.codecs.levels``): codes, steps and shifts
    mixture   groups of two widths: levels, and of each outlier its column and what it is more than its level
    planes    sums of binary planes: of each plane its bits, its scales, and the same for the tables of ``cpu/lookup.h``
    halves    floats whose type is chosen by row or group: float16 numbers and scales in float32
    floats    floats of fewer than 8 bits with more levels than 8 bits have: the codes of e5m2 that have their values

A layout fills memory that the caller sets aside, its parts aligned.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.codecs.chosen_type import decode_chosen_type
from runtime.codecs.codec import StoredTensors
from runtime.codecs.column_mixture import mixture_of
from runtime.codecs.group_mixture import decode_group_mixture, read_outlier_columns
from runtime.codecs.levels import find_span, group_count, read_levels
from runtime.codecs.scaled_elements import codebook_of
from runtime.codecs.searched_float import decode_searched_float
from runtime.formats import Format
from runtime.kernels.cpu import CpuKernels
from runtime.kernels.matrices import (
    Levels,
    Matrix,
    StoredMatrix,
    describe_levels,
    describe_matrix,
    describe_sparse,
    sum_planes,
)
from runtime.kernels.stored_planes import Packed
from runtime.packing import pack_codes, unpack_codes
from runtime.powers import power_of_two
from runtime.storage import ROWS_OF_A_MASK
from runtime.stored_tensor import packed_row_bytes

_ALIGNMENT_BYTES = 64
# Rows are laid out so many weights at a time.
_BLOCK_WEIGHTS = 1 << 22
# Of the powers of two that are float16 numbers.
_MOST_HALF_EXPONENT = 15


class _Layout(NamedTuple):
    """The bytes of the parts of a layout of a format and shape, and what fills them and returns the view of them."""

    part_bytes: Callable[[Format, tuple[int, int], CpuKernels], list[int]]
    fill: Callable[[Packed, list[Tensor], CpuKernels], Matrix]


def layout_bytes(format_: Format, shape: tuple[int, int], kernels: CpuKernels) -> int:
    """Returns the bytes of the layout of a weight; 0 where its format has none."""
    layout = _find_layout(format_)
    return 0 if layout is None else sum(map(_room_bytes, layout.part_bytes(format_, shape, kernels)))


def make_layout(weight: Packed, memory: Tensor, kernels: CpuKernels) -> Matrix:
    """Returns the view of a weight in its layout; valid while the memory is.

    Args:
        weight: The packed weight, on the CPU.
        memory: ``layout_bytes`` bytes, uint8, all zero, aligned to 64; they are filled.
        kernels: Those that will read it.
    """
    layout = _find_layout(weight.format)
    assert layout is not None
    sizes = layout.part_bytes(weight.format, weight.shape, kernels)
    rooms = torch.split(memory, [_room_bytes(size) for size in sizes])
    return layout.fill(weight, [room[:size] for room, size in zip(rooms, sizes, strict=True)], kernels)


def _find_layout(format_: Format) -> _Layout | None:
    if format_.kind == "planes" or (format_.kind == "binary" and format_.scale_type == "pow2"):
        return _Layout(_plane_parts, _fill_planes)
    if format_.kind == "group_mixture":
        return _Layout(_mixture_parts, _fill_mixture)
    if find_span(format_) is not None:
        return _Layout(_level_parts, _fill_levels)
    if format_.kind in _HALVES:
        return _Layout(_half_parts, _fill_halves)
    return _Layout(_float_parts, _fill_floats) if (format_.kind, format_.element) == ("element", "e3m2") else None


def _room_bytes(size: int) -> int:
    return -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _list_blocks(weight: Packed) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Yields the stored tensors of some rows at a time."""
    rows, columns = weight.shape
    each = max(ROWS_OF_A_MASK, _BLOCK_WEIGHTS // columns // ROWS_OF_A_MASK * ROWS_OF_A_MASK)
    masks = -(-rows // ROWS_OF_A_MASK)
    for start in range(0, rows, each):
        block = slice(start, min(start + each, rows))
        tensors = {name: t for name, t in weight._buffers.items() if t is not None}
        # What is one for the whole weight has another length; masks are one for some rows.
        taken = {name: t[block] for name, t in tensors.items() if len(t) == rows}
        if masks < rows and "mask" in tensors:
            taken["mask"] = tensors["mask"][start // ROWS_OF_A_MASK : -(-block.stop // ROWS_OF_A_MASK)]
        yield block, {**tensors, **taken}


def _level_bits(format_: Format) -> int:
    span = find_span(format_)
    assert span is not None
    return (span[1] - span[0]).bit_length()


def _level_parts(format_: Format, shape: tuple[int, int], kernels: CpuKernels) -> list[int]:
    steps = 4 * shape[0] * group_count(format_, shape[1])
    return [shape[0] * packed_row_bytes(shape[1], _level_bits(format_)), steps, steps]


def _fill_levels(weight: Packed, parts: list[Tensor], kernels: CpuKernels) -> Matrix:
    return _lay_out_levels(weight, weight.format, parts)


def _lay_out_levels(weight: Packed, format_: Format, parts: list[Tensor]) -> Matrix:
    rows, columns = weight.shape
    bits, span = _level_bits(format_), find_span(format_)
    assert span is not None
    codes = parts[0].view(rows, -1)
    step, shift = (part.view(torch.float32).view(rows, -1) for part in parts[1:])
    for block, tensors in _list_blocks(weight):
        found = read_levels(tensors, format_, (block.stop - block.start, columns))
        codes[block] = pack_codes((found.levels - span[0]).to(torch.uint8), bits)
        step[block] = found.step
        shift[block] = -span[0] * found.step + (0.0 if found.least is None else found.least)
    return describe_levels(Levels(codes, step, shift, bits, columns))


def _without_outliers(format_: Format) -> Format:
    return replace(format_, mixture=replace(mixture_of(format_), outlier_share=0.0))


def _mixture_parts(format_: Format, shape: tuple[int, int], kernels: CpuKernels) -> list[int]:
    groups = format_.group_count(shape[1])
    mixture, length = mixture_of(format_), shape[1] // groups
    outliers = shape[0] * mixture.outlier_count((groups - mixture.wide_count(groups)) * length)
    return [*_level_parts(_without_outliers(format_), shape, kernels), 4 * outliers, 4 * outliers]


def _fill_mixture(weight: Packed, parts: list[Tensor], kernels: CpuKernels) -> Matrix:
    format_, levels = weight.format, _lay_out_levels(weight, _without_outliers(weight.format), parts[:3])
    if not parts[3].numel():
        return levels
    index, value = parts[3].view(torch.int32), parts[4].view(torch.float32)
    index, value = (part.view(weight.shape[0], -1) for part in (index, value))
    for block, tensors in _list_blocks(weight):
        found = read_outlier_columns(tensors, None)
        index[block] = found
        within = {name: tensor for name, tensor in tensors.items() if name != "outlier"}
        inliers = decode_group_mixture(within, format_, (len(found), weight.shape[1]))
        value[block] = tensors["outlier"].to(torch.float32) - inliers.gather(1, found)
    return sum_planes([levels, describe_sparse(index, value, weight.shape[1])])


def _plane_parts(format_: Format, shape: tuple[int, int], kernels: CpuKernels) -> list[int]:
    (rows, columns), groups = shape, format_.group_count(shape[1])
    lookup = kernels.lookup_bytes(Matrix(rows=rows, columns=columns, bits=1, group_size=columns // groups))
    return [rows * packed_row_bytes(columns, 1), 2 * rows * groups, lookup] * format_.bits


def _fill_planes(weight: Packed, parts: list[Tensor], kernels: CpuKernels) -> Matrix:
    (rows, columns), format_ = weight.shape, weight.format
    stored = weight._buffers["scale"]
    assert stored is not None
    scales, factor = _read_plane_scales(stored.reshape(rows, -1, format_.bits), format_)
    # Planes of -1 and 1 are those of 0 and 1 less a half, twice.
    centre, factor = (0.0, factor) if format_.element == "zero_one" else (0.5, 2 * factor)
    planes = []
    for k in range(format_.bits):
        codes, scale, lookup = parts[3 * k : 3 * k + 3]
        planes.append((codes.view(rows, -1), scale.view(torch.float16).view(rows, -1).copy_(scales[..., k]), lookup))
    for block, tensors in _list_blocks(weight):
        codes = unpack_codes(tensors["codes"], format_.bits, columns)
        for k, (bits, _, _) in enumerate(planes):
            bits[block] = pack_codes(codes >> k & 1, 1)
    found = [
        (StoredMatrix(bits, scale, None, 1, columns, centre=centre, factor=factor), lookup)
        for bits, scale, lookup in planes
    ]
    return sum_planes([_look_up(plane, lookup, kernels) for plane, lookup in found])


def _look_up(plane: StoredMatrix, lookup: Tensor, kernels: CpuKernels) -> Matrix:
    if lookup.numel() == 0:
        return describe_matrix(plane)
    kernels.pack_lookup_(describe_matrix(plane), lookup)
    return describe_matrix(plane, lookup)


def _read_plane_scales(stored: Tensor, format_: Format) -> tuple[Tensor, float]:
    """Returns the scales as float16 and what they are multiplied by."""
    if format_.scale_type != "pow2":
        return stored, 1.0
    # Exponents are -24 to 16, one more than float16 has. A weight that has both loses the least: 2^-40 of its largest.
    above = max(0, int(stored.max()) - _MOST_HALF_EXPONENT)
    return power_of_two(stored.to(torch.int32) - above).to(torch.float16), 2.0**above


def _float_parts(format_: Format, shape: tuple[int, int], kernels: CpuKernels) -> list[int]:
    scale_bytes = 2 if format_.scale_type == "fp16" else 1
    return [shape[0] * shape[1], shape[0] * format_.group_count(shape[1]) * scale_bytes]


def _fill_floats(weight: Packed, parts: list[Tensor], kernels: CpuKernels) -> Matrix:
    (rows, columns), stored = weight.shape, weight._buffers["scale"]
    assert stored is not None
    table = codebook_of("e5m2").codes_of(codebook_of(weight.format.element).values)
    codes, scale = parts[0].view(rows, columns), parts[1].view(stored.dtype).view(stored.shape).copy_(stored)
    for block, tensors in _list_blocks(weight):
        codes[block] = table[unpack_codes(tensors["codes"], weight.format.bits, columns).to(torch.int32)]
    return describe_matrix(StoredMatrix(codes, scale, None, 8, columns, element="e5m2"))


def _half_parts(format_: Format, shape: tuple[int, int], kernels: CpuKernels) -> list[int]:
    return [2 * shape[0] * shape[1], 4 * shape[0] * format_.group_count(shape[1])]


def _fill_halves(weight: Packed, parts: list[Tensor], kernels: CpuKernels) -> Matrix:
    (rows, columns), format_ = weight.shape, weight.format
    codes, scale = parts[0].view(rows, -1), parts[1].view(torch.float32).view(rows, -1)
    for block, tensors in _list_blocks(weight):
        decode, read_scales = _HALVES[format_.kind]
        scale[block] = read_scales(tensors, format_)
        dense = decode(tensors, format_, (block.stop - block.start, columns))
        # Quotients are within some roundings of float32 of numbers of at most 11 bits: these are the nearest ones.
        halves = (dense.view(*scale[block].shape, -1) / scale[block].unsqueeze(-1)).to(torch.float16)
        codes[block] = halves.flatten().view(torch.uint8).view(codes[block].shape)
    return describe_matrix(StoredMatrix(codes, scale, None, 16, columns, element="scaled_float16"))


def _read_searched_scales(tensors: StoredTensors, format_: Format) -> Tensor:
    """Returns the scales of elements over a power of two that makes the largest of their split nearly 2^15."""
    # The largest of E exponent and M mantissa bits is a power of two times 2 - 2^-M; with the sign there are 1 + E + M.
    largest = 1 - power_of_two(tensors["exponent"].to(torch.int32) - format_.bits)
    return tensors["scale"].to(torch.float32) / (largest * 2.0**15).unsqueeze(-1)


# By kind of format: what reads a weight, and the scales over which its numbers are float16.
_Decode = Callable[[StoredTensors, Format, tuple[int, int]], Tensor]
_HALVES: dict[str, tuple[_Decode, Callable[[StoredTensors, Format], Tensor]]] = {
    "searched_float": (decode_searched_float, _read_searched_scales),
    "chosen_type": (decode_chosen_type, lambda tensors, _: tensors["scale"].to(torch.float32)),
}
