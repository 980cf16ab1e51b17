"""Plans under an engine's rules: a profile of finer units on the axes the engine allows, and what its rules cost.

The rules are applied to the axes, before the solve: units that the engine fuses are one unit whose loss is the sum of
theirs (`sensitivity.experts.granularity`), and what it cannot run is no candidate. So the optimum under the rules can
never lose less than the one without, and the difference is what the rules cost.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from allocator.assignments import Assignment, pick, use_of
from allocator.budget import MEMORY
from allocator.planning import predicting_metric
from allocator.plans import Plan, RulesPrice
from runtime.costs import CostTable
from runtime.engine_rules import Engine
from runtime.loading import ReferenceModel
from sensitivity.experts.granularity import MergedUnits, merge_candidates
from sensitivity.profile import LossTable, SensitivityProfile


@dataclass(frozen=True, kw_only=True, eq=False)
class Optimum:
    """The assignment that loses least on a profile.

    Args:
        profile: The profile.
        tables: Resource -> cost table.
        assignment: The assignment.
    """

    profile: SensitivityProfile
    tables: Mapping[str, CostTable]
    assignment: Assignment

    @property
    def predicted_kl(self) -> float:
        """Sum of the units' losses, by the metric that predicts."""
        table = self.profile.table(predicting_metric(self.profile, self.assignment.metric))
        return float(pick(table.loss, self.assignment.choice).sum())

    @property
    def memory_bytes(self) -> int:
        """Bytes of the weight file."""
        return round(use_of(self.assignment.choice, {MEMORY: self.tables[MEMORY]})[MEMORY])


def restrict_profile(profile: SensitivityProfile, engine: Engine) -> SensitivityProfile:
    """Returns the profile on the units and formats that an engine allows.

    Its provenance stays that of the measurement, so that a plan made from it is verified and reported as any other.

    Raises:
        ValueError: If the engine runs none of the measured formats in some unit.
    """
    merged = merge_candidates(profile.candidates, engine=engine)
    sketch, gram = profile.fisher_sketch, profile.logit_gram
    return replace(
        profile,
        candidates=merged.candidates,
        losses={name: _sum_losses(merged, table) for name, table in profile.losses.items()},
        fisher_sketch=None if sketch is None else merged.sum_table(sketch),
        logit_gram=None if gram is None else _sum_gram(merged, gram),
    )


def engine_fixed_bytes(engine: Engine, reference: ReferenceModel, *, routers: bool) -> int | None:
    """Returns the bytes of an engine's file that no choice changes, or None where it has none known beforehand.

    Args:
        engine: The engine.
        reference: The model.
        routers: Whether routers take formats too.
    """
    from runtime.exporters import FIXED_BYTES

    count = FIXED_BYTES.get(engine.exporter)
    return None if count is None else count(reference, routers=routers)


def price_engine_file(profile: SensitivityProfile, engine: Engine, fixed_bytes: int | None) -> SensitivityProfile:
    """Returns the profile with the bytes of an engine's file, or as it is where its other bytes are not known.

    Args:
        profile: The profile.
        engine: The engine.
        fixed_bytes: Bytes of the file that no choice changes (``engine_fixed_bytes``).
    """
    return profile if fixed_bytes is None else replace(profile, fixed_bytes=fixed_bytes, exporter=engine.exporter)


def price_file(profile: SensitivityProfile, plan: Plan) -> SensitivityProfile:
    """Returns the profile with the bytes of the file that a plan counts: the packed one, or that of its engine."""
    exporter = None if plan.rules is None else plan.rules.exporter
    return replace(profile, fixed_bytes=plan.fixed_bytes, exporter=exporter)


def price_rules(engine: Engine, kept: Optimum, free: Optimum) -> RulesPrice:
    """Returns what an engine's rules cost: the optimum of a budget under them beside the one without.

    Args:
        engine: The engine.
        kept: The optimum under its rules.
        free: The optimum of the same budget and metric without them.
    """
    return RulesPrice(
        engine=engine.name,
        predicted_kl=kept.predicted_kl,
        memory_bytes=kept.memory_bytes,
        unrestricted_kl=free.predicted_kl,
        unrestricted_bytes=free.memory_bytes,
        exporter=kept.profile.exporter,
    )


def _sum_losses(merged: MergedUnits, table: LossTable) -> LossTable:
    loss, std_error = merged.sum_losses(table.loss, table.std_error)
    measured = None
    if table.measured is not None:
        measured = np.ones(loss.shape, dtype=np.bool_)
        np.logical_and.at(measured, merged.member_of, table.measured)
    return LossTable(loss=loss, std_error=std_error, unit_of_measure=table.unit_of_measure, measured=measured)


def _sum_gram(merged: MergedUnits, gram: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the inner products [2, M * F, M * F] of summed sketches, from those [2, U * F, U * F] of the parts."""
    halves, formats = gram.shape[0], len(merged.candidates.formats)
    units = len(merged.member_of)
    once = merged.sum_table(gram.reshape(halves, units, formats, units, formats))
    both = merged.sum_table(once.transpose(0, 3, 4, 1, 2))
    size = len(merged.candidates.units) * formats
    return np.ascontiguousarray(both.reshape(halves, size, size))
