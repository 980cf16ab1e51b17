"""Weights as multiples of steps: the form in which kernels of integers multiply formats that are not integers.

    value = step[i, g] * level[i, j] - least[i, g],      level an integer of a span of at most 256

Block floats of few bits, ternary digits, menus of types and llama.cpp's blocks all have it, exactly: their elements are
integers times a power of two. So have groups of two widths, but their outliers. Floats of 8 bits span more, sums of
binary planes have no common step: those have none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from runtime.codecs.chosen_type import chosen_type_codes, list_types
from runtime.codecs.codec import StoredTensors
from runtime.codecs.ggml_layouts import GGML_LAYOUTS
from runtime.codecs.ggml_search import part_steps
from runtime.codecs.group_mixture import group_mixture_codes, read_group_steps
from runtime.codecs.integer import integer_codes, read_steps
from runtime.codecs.scaled_elements import read_scales, scaled_codes
from runtime.codecs.ternary import ternary_codes
from runtime.elements import ELEMENTS
from runtime.packing import unpack_codes
from runtime.storage import SELECTOR_BITS, Format, Shape

MOST_LEVELS = 256
_LEAST_FRACTION = 2.0**-16


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightLevels:
    """A weight as levels.

    Args:
        levels: [rows, columns] int16, within the span of the format.
        step: [rows, groups] float32.
        least: [rows, groups] float32, or None for 0.
    """

    levels: Tensor
    step: Tensor
    least: Tensor | None = None


def find_span(format_: Format) -> tuple[int, int] | None:
    """Returns the least and the largest level of a format, or None where it has no levels."""
    span = _SPANS[format_.kind](format_) if format_.kind in _SPANS else None
    return None if span is None or span[1] - span[0] >= MOST_LEVELS else span


def group_count(format_: Format, columns: int) -> int:
    """Returns how many steps a row has in a format with levels."""
    parts = GGML_LAYOUTS[format_.element].parts if format_.kind == "ggml" else 1
    return parts * format_.group_count(columns)


def read_levels(tensors: StoredTensors, format_: Format, shape: Shape) -> WeightLevels:
    """Returns the levels of a stored weight [rows, columns].

    Args:
        tensors: Its tensors by name.
        format_: A format that ``find_span`` knows.
        shape: (rows, columns).
    """
    return _READERS[format_.kind](tensors, format_, shape)


@cache
def _as_integers(values: tuple[float, ...]) -> tuple[tuple[int, ...], float] | None:
    """Returns integers and the power of two whose multiples the values are; None where a value is not finite."""
    fraction = 1.0
    while fraction >= _LEAST_FRACTION:
        if all(abs(value) < float("inf") and (value / fraction).is_integer() for value in values):
            return tuple(int(value / fraction) for value in values), fraction
        fraction /= 2
    return None


def _look_up(integers: tuple[int, ...], codes: Tensor) -> Tensor:
    return torch.tensor(integers, dtype=torch.int16)[codes.to(torch.int32)]


def _span_of(integers: tuple[int, ...]) -> tuple[int, int]:
    return min(integers), max(integers)


def _span_integer(format_: Format) -> tuple[int, int]:
    return (0, (1 << format_.bits) - 1)


def _read_integer(tensors: StoredTensors, format_: Format, shape: Shape) -> WeightLevels:
    scale, zero_point = read_steps(tensors, format_, None)
    step = scale.to(torch.float32)
    zero = float(1 << (format_.bits - 1)) if zero_point is None else zero_point.to(torch.float32)
    levels = integer_codes(tensors, format_, shape).to(torch.int16)
    return WeightLevels(levels=levels, step=step, least=step * zero)


def _span_element(format_: Format) -> tuple[int, int] | None:
    found = _as_integers(ELEMENTS[format_.element].values)
    return None if found is None else _span_of(found[0])


def _read_element(tensors: StoredTensors, format_: Format, shape: Shape) -> WeightLevels:
    found = _as_integers(ELEMENTS[format_.element].values)
    assert found is not None
    integers, fraction = found
    levels = _look_up(integers, scaled_codes(tensors, format_, shape))
    return WeightLevels(levels=levels, step=read_scales(tensors, format_) * fraction)


def _read_ternary(tensors: StoredTensors, format_: Format, shape: Shape) -> WeightLevels:
    levels = ternary_codes(tensors, format_, shape).to(torch.int16) - 1
    return WeightLevels(levels=levels, step=tensors["scale"].to(torch.float32))


@cache
def _types_as_integers(menu: str, bits: int) -> tuple[tuple[tuple[int, ...], ...], tuple[float, ...]] | None:
    """Returns the levels by code of each type of a menu, and the fraction that each type's step is of the scale."""
    found = [_as_integers(values) for values in list_types(menu, bits)]
    known = [each for each in found if each is not None]
    return (tuple(i for i, _ in known), tuple(f for _, f in known)) if len(known) == len(found) else None


def _span_chosen(format_: Format) -> tuple[int, int] | None:
    found = _types_as_integers(format_.element, format_.bits)
    return None if found is None else _span_of(sum(found[0], ()))


def _read_chosen(tensors: StoredTensors, format_: Format, shape: Shape) -> WeightLevels:
    found = _types_as_integers(format_.element, format_.bits)
    assert found is not None
    integers, fractions = found
    scale = tensors["scale"].to(torch.float32)
    selector = unpack_codes(tensors["selector"], SELECTOR_BITS[format_.element], scale.shape[1]).to(torch.int32)
    codes = chosen_type_codes(tensors, format_, shape).to(torch.int32).view(*scale.shape, -1)
    levels = _look_up(sum(integers, ()), codes + (selector << format_.bits).unsqueeze(-1))
    return WeightLevels(levels=levels.view(shape), step=scale * torch.tensor(fractions)[selector])


def _span_ggml(format_: Format) -> tuple[int, int]:
    return GGML_LAYOUTS[format_.element].ends


def _read_ggml(tensors: StoredTensors, format_: Format, shape: Shape) -> WeightLevels:
    layout = GGML_LAYOUTS[format_.element]
    fields = layout.unpack(tensors["blocks"].view(shape[0], format_.group_count(shape[1]), -1))
    step, least = part_steps(fields)
    levels = layout.levels(fields.codes).to(torch.int16).view(shape)
    return WeightLevels(levels=levels, step=step.flatten(1), least=None if least is None else least.flatten(1))


def _span_group_mixture(format_: Format) -> tuple[int, int] | None:
    assert format_.mixture is not None
    return None if format_.mixture.outlier_share else _span_integer(format_.mixture.wide)


def _read_group_mixture(tensors: StoredTensors, format_: Format, shape: Shape) -> WeightLevels:
    step, zero, _ = read_group_steps(tensors, format_, shape)
    levels = group_mixture_codes(tensors, format_, shape).to(torch.int16)
    return WeightLevels(levels=levels, step=step, least=step * zero)


# By kind of format.
_SPANS: dict[str, Callable[[Format], tuple[int, int] | None]] = {
    "int": _span_integer,
    "element": _span_element,
    "ternary": lambda _: (-1, 1),
    "chosen_type": _span_chosen,
    "ggml": _span_ggml,
    "group_mixture": _span_group_mixture,
}
_READERS: dict[str, Callable[[StoredTensors, Format, Shape], WeightLevels]] = {
    "int": _read_integer,
    "element": _read_element,
    "ternary": _read_ternary,
    "chosen_type": _read_chosen,
    "ggml": _read_ggml,
    "group_mixture": _read_group_mixture,
}
