"""Units without a model: of given roles, layers and experts, for what reads their names alone."""

from collections.abc import Sequence

import numpy as np

from runtime.candidates import Candidates
from runtime.formats import find_formats
from runtime.units import Unit, Weight

FORMATS = ("int2_g64", "int3_g64", "int4_g64", "int5_g64", "int6_g64", "int8_g64")


def make_unit(role: str, layer: int | None, expert: int | None = None) -> Unit:
    name = f"layers.{layer}.{role}.weight"
    kind = "linear" if expert is None else "expert"
    weight = Weight(parameter=name, expert_index=expert, shape=(64, 64), kind=kind)
    return Unit(name=name, weights=(weight,), role=role, layer_index=layer, expert_index=expert, kind=kind)


def list_units(roles: Sequence[str], layers: int, *, outside: Sequence[str] = ()) -> tuple[Unit, ...]:
    """Returns units of each role in each layer, and one of each role outside of the layers."""
    inside = [make_unit(role, layer) for layer in range(layers) for role in roles]
    return (*(make_unit(role, None) for role in outside), *inside)


def make_candidates(units: Sequence[Unit], formats: Sequence[str] = FORMATS) -> Candidates:
    """Returns candidates without a refusal."""
    allowed = np.ones((len(units), len(formats)), dtype=bool)
    return Candidates(units=tuple(units), formats=find_formats(formats), allowed=allowed, reasons={})
