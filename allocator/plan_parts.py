"""The parts of a plan: units, cache and activations of an assignment."""

from collections.abc import Mapping

import numpy as np

from allocator.assignments import Assignment, cache_use, pick
from allocator.budget import BIT_OPERATIONS, Budget
from allocator.plans import ActivationPlan, CachePlan, UnitPlan
from runtime.activation_names import module_of
from runtime.costs import CostTable
from sensitivity.profile import LossTable, SensitivityProfile


def make_unit_plans(
    profile: SensitivityProfile, assignment: Assignment, table: LossTable, memory: CostTable
) -> tuple[UnitPlan, ...]:
    """Returns the part of every unit that takes bytes.

    Args:
        profile: The profile.
        assignment: What is planned.
        table: Losses by the metric that predicts.
        memory: Bytes of each candidate.
    """
    rows = zip(
        profile.candidates.units,
        assignment.choice,
        pick(table.loss, assignment.choice),
        pick(table.std_error, assignment.choice),
        pick(memory.cost, assignment.choice),
        strict=True,
    )
    return tuple(
        UnitPlan(
            unit=unit.name,
            role=unit.role,
            layer_index=unit.layer_index,
            expert_index=unit.expert_index,
            format=profile.candidates.formats[int(f)].name,
            bits=profile.candidates.formats[int(f)].bits,
            weights=unit.weight_count,
            memory_bytes=round(float(memory_bytes)),
            predicted_loss=float(loss),
            std_error=float(std_error),
        )
        for unit, f, loss, std_error, memory_bytes in rows
        if unit.kind != "activation"
    )


def make_activation_plan(
    profile: SensitivityProfile, assignment: Assignment, table: LossTable, tables: Mapping[str, CostTable]
) -> ActivationPlan | None:
    """Returns the activations' part of a plan; None where they are not among the candidates."""
    if not profile.activations_joined:
        return None
    assert profile.activations is not None
    formats = assignment.formats_by_activation(profile.candidates)
    known = profile.activations.scales
    scales = {
        name: [float(x) for x in known[module][format_]]
        for name, format_ in formats.items()
        if format_ in known.get(module := module_of(name), {})
    }
    rows = np.array([unit.kind == "activation" for unit in profile.candidates.units])
    return ActivationPlan(
        formats=formats,
        scales=scales,
        bit_operations=tables[BIT_OPERATIONS].use(assignment.choice),
        predicted_loss=float(pick(table.loss, assignment.choice)[rows].sum()),
    )


def make_cache_plan(
    profile: SensitivityProfile, assignment: Assignment, budget: Budget, memory: CostTable
) -> CachePlan | None:
    """Returns the cache's part of a plan; None where the budget names no context."""
    if budget.context is None:
        return None
    return CachePlan(
        context=budget.context,
        batch=budget.batch,
        memory_bytes=round(cache_use(profile.candidates, assignment.choice, memory)),
        formats=assignment.formats_by_cache(profile.candidates),
    )
