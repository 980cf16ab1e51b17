"""Cost tables: what each candidate uses of one resource.

``memory_bytes`` is the size of the finished weight file, exactly: codes, scales, zero points and padding of every
unit (``Format.storage_bytes``), and as ``fixed`` everything no format changes: norms, biases, routers, and the
file's header. ``read_bytes`` is what one decoding step reads of it, in expectation: a row of the embedding for each
token of the batch, everything that all tokens share once, and an expert when at least one token takes it. With f the
share of tokens that take the expert and b tokens in the batch,

    P(expert is read) = 1 - (1 - f)^b,

as if the tokens of a batch were routed independently. Tokens of one text are not: they agree more than that, so the
formula is too high for batches of like texts. A batch of one needs no such assumption.

Where caches are units, both resources count them as full as a ``CacheLoad`` says, and a step reads all of them once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from runtime.cache_formats import CacheLoad, most_cache_bytes
from runtime.candidates import Candidates
from runtime.file_bytes import weight_bytes
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
        unit_of_measure: ``bytes``, ``us`` or ``bit operations``.
        source: Whether the numbers are exact, measured here, or modelled.
        device: Device the numbers hold for, or None.
    """

    resource: str
    cost: NDArray[np.float64]
    fixed: float
    unit_of_measure: str
    source: CostSource
    device: str | None = None

    def use(self, choice: NDArray[np.int64]) -> float:
        """Returns the use of the whole model by a choice [U] of formats."""
        return float(self.cost[np.arange(len(choice)), choice].sum() + self.fixed)


def unit_bytes(unit: Unit, format_: Format, load: CacheLoad | None = None, exporter: str | None = None) -> int:
    """Returns the bytes of a unit in one format: of its weights in a file, or the most of a cache up to a load."""
    if unit.cache_shape is not None:
        assert load is not None
        return most_cache_bytes(format_, unit.cache_shape, load)
    return sum(weight_bytes(weight, format_, exporter) for weight in unit.weights)


def memory_cost(
    candidates: Candidates, fixed_bytes: int, *, load: CacheLoad | None = None, exporter: str | None = None
) -> CostTable:
    """Returns the bytes each candidate takes, in the weight file or in the cache.

    Args:
        candidates: Units and formats.
        fixed_bytes: Bytes of everything else in the file, its header included.
        load: How full caches are that are among the units.
        exporter: Who writes the file, as in ``runtime.file_bytes``; None for the packed one.
    """
    return CostTable(
        resource="memory_bytes",
        cost=fill_costs(candidates, partial(unit_bytes, load=load, exporter=exporter)),
        fixed=float(fixed_bytes),
        unit_of_measure="bytes",
        source="exact",
    )


def read_cost(
    candidates: Candidates,
    fixed_bytes: int,
    *,
    expert_share: float = 1.0,
    expert_frequency: Mapping[tuple[int, int], float] | None = None,
    batch_tokens: int = 1,
    load: CacheLoad | None = None,
) -> CostTable:
    """Returns the bytes each candidate makes one decoding step read, in expectation.

    Args:
        candidates: Units and formats.
        fixed_bytes: Bytes of the unquantized rest.
        expert_share: Experts a token visits / experts of a layer; every expert's frequency where none is measured.
        expert_frequency: (layer index, expert index) -> share of tokens that take the expert; None when not measured.
        batch_tokens: Sequences decoded together, b; 1 gives the bytes read per token.
        load: How full caches are that are among the units.

    Raises:
        ValueError: If ``batch_tokens`` is not positive, a frequency is not a share, or an expert has none.
    """
    if batch_tokens < 1:
        msg = f"batch_tokens must be at least 1: got batch_tokens={batch_tokens}. Give the sequences decoded together."
        raise ValueError(msg)

    def read_bytes(unit: Unit, format_: Format) -> float:
        if unit.cache_shape is not None:
            return unit_bytes(unit, format_, load)
        return sum(
            read_share(weight, visit_share(unit, weight, expert_share, expert_frequency), batch_tokens)
            * format_.storage_bytes(weight.shape)
            for weight in unit.weights
        )

    return CostTable(
        resource="read_bytes",
        cost=fill_costs(candidates, read_bytes),
        fixed=float(fixed_bytes),
        unit_of_measure="bytes",
        source="modelled",
    )


def visit_share(
    unit: Unit, weight: Weight, expert_share: float, expert_frequency: Mapping[tuple[int, int], float] | None
) -> float:
    """Returns the share of tokens that a weight multiplies: 1 but for experts.

    Args:
        unit: The unit of the weight.
        weight: The weight.
        expert_share: Every expert's share where none is measured.
        expert_frequency: (layer index, expert index) -> share of tokens that take the expert; None when not measured.

    Raises:
        ValueError: If a frequency is not a share, or an expert has none.
    """
    if weight.kind != "expert":
        return 1.0
    if expert_frequency is None:
        return expert_share
    key = (-1 if unit.layer_index is None else unit.layer_index, weight.expert_index or 0)
    frequency = expert_frequency.get(key)
    if frequency is None or not 0.0 <= frequency <= 1.0:
        msg = (
            f"expert_frequency must hold a share from 0 to 1 for every expert: got {frequency} for "
            f"'{weight.name}'. Measure the routing of this model."
        )
        raise ValueError(msg)
    return frequency


def read_share(weight: Weight, frequency: float, batch_tokens: int) -> float:
    """Returns the share of a weight's bytes that one step of ``batch_tokens`` tokens reads, in expectation.

    Args:
        weight: The weight.
        frequency: Share of tokens that it multiplies (``visit_share``).
        batch_tokens: Sequences decoded together.
    """
    if weight.kind == "expert":
        # No power where none is needed: at one token the share is the frequency to the last bit.
        return frequency if batch_tokens == 1 else 1.0 - (1.0 - frequency) ** batch_tokens
    if weight.kind == "embedding" and not weight.aliases:
        return min(batch_tokens / weight.shape[0], 1.0)
    return 1.0


def fill_costs(candidates: Candidates, price: Callable[[Unit, Format], float]) -> NDArray[np.float64]:
    """Returns the price of every allowed pair of unit and format, [U, F]; NaN for the others."""
    cost = np.full(candidates.allowed.shape, np.nan)
    for u, f in zip(*np.nonzero(candidates.allowed), strict=True):
        cost[u, f] = price(candidates.units[u], candidates.formats[f])
    return cost
