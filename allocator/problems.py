"""From a profile and a budget to the arrays of an allocation problem."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator.budget import MEMORY, RESOURCES, Budget
from allocator.paired import PairedProblem, pair_problem
from runtime.bit_operations import PairedCost, bit_operations_cost
from runtime.costs import CostTable, memory_cost, read_cost
from runtime.units import count_weights
from sensitivity.profile import SensitivityProfile
from solvers import AllocationProblem


def build_cost_tables(
    profile: SensitivityProfile, latency: CostTable | None = None, *, batch_tokens: int = 1
) -> dict[str, CostTable]:
    """Returns the cost table of every resource that can be priced, by resource.

    Args:
        profile: The profile.
        latency: A measured latency table, or None when no latency is limited.
        batch_tokens: Sequences decoded together, for the bytes that a step reads.
    """
    tables = [
        memory_cost(profile.candidates, profile.fixed_bytes, load=profile.cache_load, exporter=profile.exporter),
        read_cost(
            profile.candidates,
            profile.rest_bytes,
            expert_share=profile.expert_share,
            expert_frequency=None if profile.routing is None else profile.routing.frequency_by_expert(),
            batch_tokens=batch_tokens,
            load=profile.cache_load,
        ),
    ]
    if latency is not None:
        tables.append(latency)
    if profile.activations_joined:
        frequency = None if profile.routing is None else profile.routing.frequency_by_expert()
        tables.append(
            bit_operations_cost(profile.candidates, expert_share=profile.expert_share, expert_frequency=frequency)
        )
    return {table.resource: table for table in tables}


def resolve_limits(profile: SensitivityProfile, budget: Budget) -> dict[str, float]:
    """Returns resource -> limit of the whole model for a budget; empty for a pure ceiling on loss."""
    limits = {name: float(limit) for name, limit in budget.limits.items()}
    if budget.memory_bytes is not None:
        limits[MEMORY] = min(float(budget.memory_bytes), limits.get(MEMORY, np.inf))
    if budget.bits_per_weight is not None:
        own = profile.fixed_bytes + budget.bits_per_weight * count_weights(profile.candidates.units) / 8
        limits[MEMORY] = min(own, limits.get(MEMORY, np.inf))
    return {name: limits[name] for name in RESOURCES if name in limits}


def build_problem(
    profile: SensitivityProfile,
    loss: NDArray[np.float64],
    limits: Mapping[str, float],
    tables: Mapping[str, CostTable],
    *,
    sketch: NDArray[np.float32] | None = None,
    interaction_scale: float = 1.0,
) -> AllocationProblem:
    """Returns the allocation problem of a loss table under limits of whole-model use.

    Args:
        profile: The profile.
        loss: [U, F] of one metric.
        limits: Resource -> limit, fixed use included. Memory is always among the problem's resources, unlimited
            when not named.
        tables: Resource -> cost table, with every limited resource.
        sketch: [S, U, F], or None without cross terms.
        interaction_scale: Factor of the cross terms.
    """
    resources = tuple(dict.fromkeys([MEMORY, *limits]))
    return AllocationProblem(
        loss=loss,
        cost=np.stack([tables[name].cost for name in resources]),
        limit=np.array([limits.get(name, np.inf) - tables[name].fixed for name in resources]),
        allowed=profile.candidates.allowed,
        resources=resources,
        sketch=sketch,
        interaction_scale=interaction_scale,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class PosedProblem:
    """A problem as it is solved.

    Args:
        problem: Over the units, or over pairs of weights and activations.
        paired: How pairs are read back; None where the problem is over the units themselves.
    """

    problem: AllocationProblem
    paired: PairedProblem | None

    def read(self, choice: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the format index [U] of every unit, from what a solver chose."""
        return choice if self.paired is None else self.paired.read(choice)


def pose_problem(
    profile: SensitivityProfile,
    loss: NDArray[np.float64],
    limits: Mapping[str, float],
    tables: Mapping[str, CostTable],
) -> PosedProblem:
    """Returns the problem of ``build_problem`` without cross terms, over pairs where bit operations are limited.

    Args:
        profile: The profile.
        loss: [U, F] of one metric.
        limits: Resource -> limit, fixed use included.
        tables: Resource -> cost table, with every limited resource.
    """
    problem = build_problem(profile, loss, limits, tables)
    paired_costs = [tables[name] for name in problem.resources if isinstance(tables[name], PairedCost)]
    if not paired_costs:
        return PosedProblem(problem=problem, paired=None)
    [cost] = paired_costs
    assert isinstance(cost, PairedCost)
    paired = pair_problem(problem, cost)
    return PosedProblem(problem=paired.problem, paired=paired)
