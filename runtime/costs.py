"""Cost tables: what each candidate uses of one resource.

``memory_bytes`` is the size of the finished weight file, exactly: codes, scales, zero points and padding of every
unit (``Format.storage_bytes``), and as ``fixed`` everything no format changes: norms, biases, routers, and the
file's header. ``read_bytes`` is what one generated token reads of it: embeddings one row, experts by the share of
them that a token visits, tied heads in full.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from runtime.candidates import Candidates
from runtime.formats import Format
from runtime.units import Unit, Weight

CostSource = Literal["exact", "measured", "modelled"]


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """The use of one resource by every candidate.

    Args:
        resource: Name of the resource.
        cost: [U, F]; NaN where the pair is not allowed.
        fixed: Use that no choice changes.
        unit_of_measure: ``bytes`` or ``us``.
        source: Whether the numbers are exact, measured here, or modelled.
        device: Device the numbers hold for, or None.
    """

    resource: str
    cost: NDArray[np.float64]
    fixed: float
    unit_of_measure: str
    source: CostSource
    device: str | None = None


def unit_bytes(unit: Unit, format_: Format) -> int:
    """Returns the bytes of all weights of a unit in one format."""
    return sum(format_.storage_bytes(weight.shape) for weight in unit.weights)


def memory_cost(candidates: Candidates, fixed_bytes: int) -> CostTable:
    """Returns the bytes each candidate takes in the weight file.

    Args:
        candidates: Units and formats.
        fixed_bytes: Bytes of everything else in the file, its header included.
    """
    return CostTable(
        resource="memory_bytes",
        cost=_fill(candidates, unit_bytes),
        fixed=float(fixed_bytes),
        unit_of_measure="bytes",
        source="exact",
    )


def read_cost(candidates: Candidates, fixed_bytes: int, *, expert_share: float = 1.0) -> CostTable:
    """Returns the bytes each candidate makes one generated token read.

    Args:
        candidates: Units and formats.
        fixed_bytes: Bytes of the unquantized rest.
        expert_share: Experts a token visits / experts of a layer.
    """

    def read_bytes(unit: Unit, format_: Format) -> float:
        return sum(_read_share(weight, expert_share) * format_.storage_bytes(weight.shape) for weight in unit.weights)

    return CostTable(
        resource="read_bytes",
        cost=_fill(candidates, read_bytes),
        fixed=float(fixed_bytes),
        unit_of_measure="bytes",
        source="modelled",
    )


def _read_share(weight: Weight, expert_share: float) -> float:
    if weight.kind == "expert":
        return expert_share
    if weight.kind == "embedding" and not weight.aliases:
        return 1.0 / weight.shape[0]
    return 1.0


def _fill(candidates: Candidates, price: Callable[[Unit, Format], float]) -> NDArray[np.float64]:
    cost = np.full(candidates.allowed.shape, np.nan)
    for u, f in zip(*np.nonzero(candidates.allowed), strict=True):
        cost[u, f] = price(candidates.units[u], candidates.formats[f])
    return cost
