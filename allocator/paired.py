"""Weights and activations under a limit on bit operations, as one choice of pairs.

The bit operations of a unit are a product of its weights' bits and its activations' bits (``runtime.bit_operations``);
losses and all other costs are sums. A unit of weights u with its activations s(u) becomes one row whose columns are the
pairs (f, a),

    loss[u, (f, a)] = loss[u, f] + loss[s(u), a],      cost[r, u, (f, a)] = cost[r, u, f] + cost[r, s(u), a],
    bit operations[u, (f, a)] = n_u b_w(f) b_a(a),

where unquantized weights go with unquantized activations alone, so that the problem is a multiple-choice knapsack
again, solved exactly and with the same proof. A choice of pairs is read back as a format for each unit.

Limits: F A columns for F formats of weights and A of activations.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bit_operations import UNQUANTIZED_BITS, PairedCost
from solvers import AllocationProblem


@dataclass(frozen=True, kw_only=True, eq=False)
class PairedProblem:
    """A problem whose columns are pairs of formats.

    Args:
        problem: Over U' rows and F * A columns (format of the weights, format of the activations).
        rows: [U'] index of the unit of each row.
        partner: [U'] index of its activation unit, -1 for none.
        seconds: [A] indices of the formats of activations.
    """

    problem: AllocationProblem
    rows: NDArray[np.int64]
    partner: NDArray[np.int64]
    seconds: NDArray[np.int64]

    def read(self, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the format index [U] of every unit, from the column [U'] of every row."""
        paired = self.partner >= 0
        choice = np.zeros(len(self.rows) + int(paired.sum()), dtype=np.int64)
        choice[self.rows] = pairs // len(self.seconds)
        choice[self.partner[paired]] = self.seconds[pairs[paired] % len(self.seconds)]
        return choice


def pair_problem(problem: AllocationProblem, cost: PairedCost) -> PairedProblem:
    """Returns the problem of pairs.

    Args:
        problem: Over weights and activations, with the paired resource among its resources (its row of cost is that of
            unquantized activations) and no cross terms.
        cost: The paired resource.
    """
    rows = np.setdiff1d(np.arange(problem.n_units), cost.partner)
    partner = cost.partner[rows]
    paired = (partner >= 0)[:, None]
    seconds = np.flatnonzero(problem.allowed[partner[partner >= 0]].any(axis=0))
    # A unit without activations has one pair for each format: the first of them.
    alone = np.zeros((len(rows), len(seconds)), dtype=bool)
    alone[:, 0] = True
    allowed = _combine(
        problem.allowed[rows], np.where(paired, problem.allowed[partner][:, seconds], alone), np.logical_and
    )
    if cost.unquantized[seconds].any():
        apart = _combine(cost.unquantized[None, :], ~cost.unquantized[None, seconds], np.logical_and)
        allowed &= ~(apart & paired)
    costs = []
    for resource, own in zip(problem.resources, problem.cost, strict=True):
        if resource == cost.resource:
            share = np.where(paired, cost.activation_bits[seconds] / UNQUANTIZED_BITS, 1.0)
            costs.append(_combine(own[rows], share, np.multiply))
        else:
            costs.append(_combine(own[rows], np.where(paired, own[partner][:, seconds], 0.0), np.add))
    loss = _combine(problem.loss[rows], np.where(paired, problem.loss[partner][:, seconds], 0.0), np.add)
    return PairedProblem(
        problem=replace(problem, loss=loss, cost=np.stack(costs), allowed=allowed),
        rows=rows,
        partner=partner,
        seconds=seconds,
    )


def _combine(first: NDArray[Any], second: NDArray[Any], how: Callable[..., NDArray[Any]]) -> NDArray[Any]:
    """Returns [U, F * A] of every pair of [U, F] and [U, A]."""
    return how(first[:, :, None], second[:, None, :]).reshape(len(first), -1)
