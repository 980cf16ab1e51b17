"""Activation units: what the linear layers of a unit of weights read, quantized before the product.

Each unit of linear layers has one, named after it: its layers may read different tensors (fused layers of several
blocks) or one together; each rounds its own input, as engines do whose schemes are set layer by layer. Heads,
embeddings and experts have none: engines leave these inputs as they are, and experts are no modules of their own.
"""

from collections.abc import Sequence

import numpy as np

from runtime.activation_formats import find_activation_formats
from runtime.activation_names import ACTIVATION, activation_name
from runtime.candidates import Candidates
from runtime.units import Unit


def list_activation_units(units: Sequence[Unit]) -> tuple[Unit, ...]:
    """Returns the activation units of the units that hold linear layers and nothing else, in their order.

    Raises:
        ValueError: If there are none.
    """
    found = tuple(_make_unit(unit) for unit in units if {weight.kind for weight in unit.weights} == {"linear"})
    if not found:
        msg = (
            f"activation formats need linear layers outside of experts: got none in {len(units)} units. Leave them out."
        )
        raise ValueError(msg)
    return found


def list_activation_candidates(units: Sequence[Unit], format_names: Sequence[str]) -> Candidates:
    """Returns the formats of activation units: every unit may take every one.

    Args:
        units: Units of weights.
        format_names: F names of formats.

    Raises:
        ValueError: If a format is unknown, or there is no linear layer.
    """
    own, formats = list_activation_units(units), find_activation_formats(format_names)
    return Candidates(units=own, formats=formats, allowed=np.ones((len(own), len(formats)), dtype=bool), reasons={})


def _make_unit(unit: Unit) -> Unit:
    return Unit(
        name=activation_name(unit.name),
        weights=(),
        role=f"{unit.role}.{ACTIVATION}",
        layer_index=unit.layer_index,
        expert_index=None,
        kind="activation",
        modules=tuple(weight.parameter.removesuffix(".weight") for weight in unit.weights),
    )
