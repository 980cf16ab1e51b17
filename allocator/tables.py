"""From a profile, a plan and its evaluations to the tables of a report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from allocator.expert_tables import affinity_table, expert_table
from allocator.notes import list_notes
from allocator.planning import UNIFORM_RULE, predicting_metric
from allocator.plans import Evaluation, Plan
from allocator.rule_prices import price_rules_of
from reports import Calibration, Headline, Report
from sensitivity.profile import NATS, SensitivityProfile

if TYPE_CHECKING:
    from numpy.typing import NDArray

_INTEGERS = ("layer_index", "expert_index")


def make_report(
    profile: SensitivityProfile,
    plan: Plan,
    evaluations: Sequence[Evaluation],
    frontier: Sequence[Mapping[str, float]],
) -> Report:
    """Returns the report of a plan.

    Args:
        profile: The profile the plan was made from.
        plan: The plan.
        evaluations: Reference, plan and uniform formats on evaluation text; the plan is the shipped one.
        frontier: Points of least predicted loss by memory.
    """
    return Report(
        title=f"{profile.provenance['model']}: {plan.budget}",
        model_name=profile.provenance["model"],
        headline=_headline(profile, plan, evaluations),
        plan=_plan_table(profile, plan),
        frontier=pd.DataFrame(list(frontier)),
        evaluations=_evaluation_table(evaluations),
        sensitivities=_sensitivity_table(profile),
        provenance={k: str(v) for k, v in {**plan.provenance, "solver": plan.solver}.items()},
        notes=list_notes(profile, plan, evaluations),
        calibration=_calibration(profile, plan),
        **{name: table for name, table in _optional_tables(profile, plan).items() if len(table)},
    )


def _optional_tables(profile: SensitivityProfile, plan: Plan) -> dict[str, pd.DataFrame]:
    return {
        "experts": expert_table(profile, plan),
        "affinity": affinity_table(profile.routing),
        "rule_prices": pd.DataFrame([asdict(price) for price in price_rules_of(profile, plan)]),
    }


def _calibration(profile: SensitivityProfile, plan: Plan) -> Calibration | None:
    fit = profile.prediction_fits.get(predicting_metric(profile, plan.metric))
    if fit is None:
        return None
    return Calibration(factor=fit.factor, exponent=fit.exponent, error_factor=fit.error_factor, plans=fit.plans)


def _headline(profile: SensitivityProfile, plan: Plan, evaluations: Sequence[Evaluation]) -> Headline:
    shipped = next(e for e in evaluations if e.shipped)
    reference = next(e for e in evaluations if e.kind == "reference")
    uniform = [e for e in evaluations if e.kind == "uniform" and not e.shipped]
    best = min(uniform, key=lambda e: e.kl) if uniform else None
    return Headline(
        shipped_plan_name=plan.name,
        memory_bytes=plan.memory_bytes,
        reference_memory_bytes=plan.reference_memory_bytes,
        bits_per_weight=plan.bits_per_weight,
        budget_text=plan.budget,
        predicted_kl=plan.predicted_kl,
        measured_kl=shipped.kl,
        measured_kl_low=shipped.kl_low,
        measured_kl_high=shipped.kl_high,
        best_uniform_name=best.name if best else None,
        best_uniform_kl=best.kl if best else None,
        perplexity=shipped.perplexity,
        reference_perplexity=reference.perplexity,
        objective=plan.objective,
        objective_unit=_objective_unit(profile, plan),
        lower_bound=plan.lower_bound,
        relative_gap=plan.relative_gap,
        verdict=plan.verdict,
    )


def _objective_unit(profile: SensitivityProfile, plan: Plan) -> str:
    if plan.minimises_memory:
        return "bytes"
    # A uniform rule minimises nothing: its objective is its prediction.
    table = profile.losses.get(plan.metric)
    if table is None or table.unit_of_measure == NATS or plan.termination == UNIFORM_RULE:
        return "nats per token"
    return table.unit_of_measure


def _plan_table(profile: SensitivityProfile, plan: Plan) -> pd.DataFrame:
    table = pd.DataFrame([asdict(unit) for unit in plan.units])
    tokens = 0 if profile.cache_load is None else profile.cache_load.token_count
    shapes = {unit.name: unit.cache_shape for unit in profile.candidates.units if unit.cache_shape is not None}
    # A cache has no weights: its bits are those of each number that it holds.
    cached = table["unit"].map(lambda name: math.prod(shapes.get(name, (0,))) * tokens)
    table["bits_per_weight"] = 8.0 * table["memory_bytes"] / (table["weights"] + cached)
    return table.astype(dict.fromkeys(_INTEGERS, "Int64"))


def _evaluation_table(evaluations: Sequence[Evaluation]) -> pd.DataFrame:
    table = pd.DataFrame([asdict(evaluation) for evaluation in evaluations]).rename(columns={"kl": "measured_kl"})
    return table.astype({"predicted_kl": "float64"})


def _sensitivity_table(profile: SensitivityProfile) -> pd.DataFrame:
    candidates = profile.candidates
    metrics = [name for name, table in profile.losses.items() if table.unit_of_measure == NATS] or list(profile.losses)
    rows, columns = np.nonzero(candidates.allowed)
    parts = [_metric_rows(profile, metric, rows, columns) for metric in metrics]
    return pd.concat(parts, ignore_index=True).astype(dict.fromkeys(_INTEGERS, "Int64"))


def _metric_rows(
    profile: SensitivityProfile, metric: str, rows: "NDArray[np.int64]", columns: "NDArray[np.int64]"
) -> pd.DataFrame:
    units = [profile.candidates.units[u] for u in rows]
    formats = [profile.candidates.formats[f] for f in columns]
    table = profile.losses[metric]
    return pd.DataFrame(
        {
            "unit": [unit.name for unit in units],
            "role": [unit.role for unit in units],
            "layer_index": pd.array([unit.layer_index for unit in units], dtype="Int64"),
            "expert_index": pd.array([unit.expert_index for unit in units], dtype="Int64"),
            "format": [f.name for f in formats],
            "bits": [f.bits for f in formats],
            "loss": table.loss[rows, columns],
            "std_error": table.std_error[rows, columns],
            "metric": metric,
        }
    )
