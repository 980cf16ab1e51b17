"""Reports say what was minimised, in its own unit, and tell a prediction from none."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import allocator
from allocator import Budget, Plan, SensitivityProfile, Store, load_plan, save_plan
from allocator.tables import make_report
from reports import Report
from reports.wording import bound_sentence, prediction_sentence

Make = Callable[[SensitivityProfile, Budget, str], tuple[Plan, Report]]


@pytest.fixture
def make(tiny_llama_dir: Path, tiny_store: Store) -> Make:
    def run(profile: SensitivityProfile, budget: Budget, metric: str) -> tuple[Plan, Report]:
        plan = allocator.plan(
            str(tiny_llama_dir), budget, profile=profile, metric=metric, store=tiny_store, verify=False
        )
        evaluations = allocator.evaluate(str(tiny_llama_dir), plan, store=tiny_store)
        return plan, make_report(profile, plan, evaluations, allocator.frontier(profile, store=tiny_store, points=5))

    return run


def test_report_of_a_plan_under_a_budget(make: Make, tiny_profile: SensitivityProfile) -> None:
    plan, report = make(tiny_profile, Budget(bits_per_weight=4.5), "combined")
    assert "predicted loss is" in bound_sentence(report.headline)
    assert "nats per token" in bound_sentence(report.headline)
    assert report.headline.measured_kl == report.evaluations.set_index("name").loc[plan.name, "measured_kl"]
    assert report.plan["predicted_loss"].sum() == pytest.approx(plan.predicted_kl)
    bits = (report.plan["bits_per_weight"] * report.plan["weights"]).sum() / report.plan["weights"].sum()
    assert bits == pytest.approx(plan.bits_per_weight)
    assert report.notes[0].startswith("Additivity: the units' losses sum to")
    rows = report.sensitivities
    assert set(rows["metric"]) == {"fisher", "single_unit_kl", "combined"}
    assert len(rows) == 3 * int(tiny_profile.candidates.allowed.sum())
    first = rows[(rows["metric"] == "combined") & (rows["format"] == "int3_g64")].iloc[0]
    u = [unit.name for unit in tiny_profile.candidates.units].index(first["unit"])
    assert first["loss"] == tiny_profile.table("combined").loss[u, tiny_profile.candidates.format_index("int3_g64")]


def test_report_of_a_plan_under_a_ceiling_speaks_of_bytes(make: Make, tiny_profile: SensitivityProfile) -> None:
    plan, report = make(tiny_profile, Budget(max_kl=0.05), "combined")
    assert report.headline.objective_unit == "bytes"
    assert report.headline.objective == plan.memory_bytes
    assert bound_sentence(report.headline).startswith("This plan's size is ")


def test_report_without_a_metric_in_nats(make: Make, tiny_profile: SensitivityProfile, tmp_path: Path) -> None:
    bare = replace(
        tiny_profile, losses={"weight_error": tiny_profile.table("weight_error")}, fisher_sketch=None, logit_gram=None
    )
    plan, report = make(bare, Budget(bits_per_weight=4.5), "weight_error")
    save_plan(plan, tmp_path / "plan.json")
    assert np.isnan(load_plan(tmp_path / "plan.json").predicted_kl)
    assert "the metric of this plan predicts no nats per token" in prediction_sentence(report.headline)
    assert "minimised error is" in bound_sentence(report.headline)
    assert "squared error" in bound_sentence(report.headline)
    assert report.notes[0].startswith("The finished plan measures")
