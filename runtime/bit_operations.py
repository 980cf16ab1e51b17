"""Bit operations of one token: what a product of b_w-bit weights with b_a-bit activations is worth, summed.

    sum over units u of    n_u * b_w(f_u) * b_a(a_u)

with n_u the multiplications of a token (the weights that it passes), b_w the bits of the codes of a weight and b_a the
bits of an element of the activations that the layer reads: 16 where they are unquantized or no unit. It is the cost of
bit-serial hardware and the usual measure of low-bit arithmetic (HAWQ-V3, arXiv:2011.10680, calls it BOPS); what a
device makes of it depends on its kernels.

The cost of a weight's format depends on that of its activations: it is no table [U, F]. ``allocator.paired`` turns
both into one choice.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.activation_names import activation_name
from runtime.candidates import Candidates
from runtime.costs import CostTable, visit_share
from runtime.formats import Format
from runtime.units import Unit, Weight

BIT_OPERATIONS = "bit_operations"
UNQUANTIZED_BITS = 16


@dataclass(frozen=True, kw_only=True)
class PairedCost(CostTable):
    """A resource that weights use together with the activations they read; ``cost`` is that with 16-bit activations.

    Args:
        partner: [U] index of the activation unit of each unit, -1 for none.
        activation_bits: [F] of each format as one of activations.
        unquantized: [F] bool. Weights that are take activations that are, where there are such: no product of others
            is taken in fewer than 16 bits.
    """

    partner: NDArray[np.int64]
    activation_bits: NDArray[np.float64]
    unquantized: NDArray[np.bool_]

    def use(self, choice: NDArray[np.int64]) -> float:
        """Returns the use of a choice [U] of formats for weights and activations."""
        rows = np.arange(len(choice))
        bits = np.where(self.partner >= 0, self.activation_bits[choice[self.partner]], UNQUANTIZED_BITS)
        return float((self.cost[rows, choice] * bits).sum() / UNQUANTIZED_BITS + self.fixed)


def bit_operations_cost(
    candidates: Candidates,
    *,
    expert_share: float = 1.0,
    expert_frequency: Mapping[tuple[int, int], float] | None = None,
) -> PairedCost:
    """Returns the bit operations of one token.

    Args:
        candidates: Weights and, after them, activations.
        expert_share: Every expert's share of tokens where none is measured.
        expert_frequency: (layer index, expert index) -> share of tokens that take the expert; None when not measured.
    """
    rows = {unit.name: u for u, unit in enumerate(candidates.units)}
    partner = np.array([rows.get(activation_name(unit.name), -1) for unit in candidates.units], dtype=np.int64)
    cost = np.full(candidates.allowed.shape, np.nan)
    for u, f in zip(*np.nonzero(candidates.allowed), strict=True):
        unit = candidates.units[u]
        cost[u, f] = UNQUANTIZED_BITS * sum(
            _multiplications(unit, weight, expert_share, expert_frequency)
            * _code_bits(candidates.formats[f], weight.shape)
            for weight in unit.weights
        )
    return PairedCost(
        resource=BIT_OPERATIONS,
        cost=cost,
        fixed=0.0,
        unit_of_measure="bit operations",
        source="exact",
        partner=partner,
        activation_bits=np.array([float(f.bits) for f in candidates.formats]),
        unquantized=np.array([f.unquantized for f in candidates.formats]),
    )


def _multiplications(
    unit: Unit, weight: Weight, expert_share: float, expert_frequency: Mapping[tuple[int, int], float] | None
) -> float:
    if weight.kind == "embedding" and not weight.aliases:
        return 0.0
    return weight.weight_count * visit_share(unit, weight, expert_share, expert_frequency)


def _code_bits(format_: Format, shape: tuple[int, int]) -> float:
    return 8 * format_.code_bytes(shape) / (shape[0] * shape[1])
