"""Planning against every choice there is: optimal, feasible, its numbers recomputed, its refusals reachable."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import allocator
from allocator.assignments import Assignment
from allocator.budget import Budget, InfeasibleBudget
from allocator.planning import (
    default_metric,
    find_assignment,
    find_interacting_assignment,
    find_least_loss,
    make_plan,
    predicted_kl,
)
from allocator.plans import Plan
from allocator.problems import build_cost_tables, resolve_limits
from runtime.costs import CostTable, unit_bytes
from sensitivity.profile import SensitivityProfile
from tests.tiny_measurements import keep_units, list_choices

METRICS = ("combined", "fisher", "single_unit_kl", "output_error", "weight_error")


@pytest.fixture(scope="module")
def profile(tiny_profile: SensitivityProfile) -> SensitivityProfile:
    """Six units: 2 * 5 ** 5 choices or so."""
    return keep_units(tiny_profile, 6)


@pytest.fixture(scope="module")
def tables(profile: SensitivityProfile) -> dict[str, CostTable]:
    """Memory and bytes read, and a latency by which narrow formats are slow."""
    shape = profile.candidates.allowed.shape
    cost = np.where(profile.candidates.allowed, np.linspace(9, 2, shape[1]) + np.arange(shape[0])[:, None], np.nan)
    latency = CostTable(resource="latency_us", cost=cost, fixed=0.0, unit_of_measure="us", source="measured")
    return build_cost_tables(profile, latency)


class Everything:
    """All choices with their losses and uses, computed without the planner."""

    def __init__(self, profile: SensitivityProfile, tables: Mapping[str, CostTable], metric: str) -> None:
        self.choices = list_choices(profile)
        units = np.arange(self.choices.shape[1])
        self.loss = profile.table(metric).loss[units, self.choices].sum(axis=1)
        self.use = {name: t.cost[units, self.choices].sum(axis=1) + t.fixed for name, t in tables.items()}

    def kept(self, limits: Mapping[str, float]) -> NDArray[np.bool_]:
        return np.all([self.use[name] <= limit * (1 + 1e-12) for name, limit in limits.items()], axis=0)


def middle(everything: Everything, name: str, share: float) -> float:
    use = everything.use[name]
    return float(use.min() + share * (use.max() - use.min()))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.8])
def test_memory_budget_is_solved_exactly(
    metric: str, share: float, profile: SensitivityProfile, tables: dict[str, CostTable]
) -> None:
    everything = Everything(profile, tables, metric)
    budget = Budget(memory_bytes=middle(everything, "memory_bytes", share))
    found = find_assignment(profile, budget, tables, metric=metric)
    best = everything.loss[everything.kept(resolve_limits(profile, budget))].min()
    assert found.result is not None
    assert found.result.objective == pytest.approx(best, rel=1e-9)
    assert found.result.lower_bound <= best + 1e-9 * abs(best)


def test_several_budgets_are_solved_exactly(profile: SensitivityProfile, tables: dict[str, CostTable]) -> None:
    everything = Everything(profile, tables, "combined")
    limits = {
        "read_bytes": middle(everything, "read_bytes", 0.4),
        "latency_us": middle(everything, "latency_us", 0.5),
    }
    budget = Budget(memory_bytes=middle(everything, "memory_bytes", 0.45), limits=limits)
    found = find_assignment(profile, budget, tables, metric="combined")
    kept = everything.kept(resolve_limits(profile, budget))
    assert 0 < kept.sum() < len(kept)
    assert found.result is not None
    assert found.result.objective == pytest.approx(everything.loss[kept].min(), rel=1e-9)
    made = make_plan(profile, found, budget, tables, {})
    for name, limit in resolve_limits(profile, budget).items():
        assert made.use[name] <= limit


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_ceiling_on_loss_takes_the_fewest_bytes_of_the_file(
    limited: bool, share: float, profile: SensitivityProfile, tables: dict[str, CostTable]
) -> None:
    everything = Everything(profile, tables, "combined")
    ceiling = float(everything.loss.min() + share * (np.median(everything.loss) - everything.loss.min()))
    limits = {"latency_us": middle(everything, "latency_us", 0.3)} if limited else {}
    budget = Budget(max_kl=ceiling, limits=limits)
    found = find_assignment(profile, budget, tables, metric="combined")
    kept = everything.kept(limits) & (everything.loss <= ceiling) if limited else everything.loss <= ceiling
    made = make_plan(profile, found, budget, tables, {})
    assert made.objective == everything.use["memory_bytes"][kept].min() == made.memory_bytes
    assert made.lower_bound <= made.objective
    assert made.lower_bound > profile.fixed_bytes
    assert made.relative_gap == pytest.approx((made.objective - made.lower_bound) / made.objective, abs=1e-15)
    assert made.predicted_kl <= ceiling * (1 + 1e-9)
    assert set(made.shadow_prices) == {"max_kl", *limits}


def test_uniform_rule_under_a_ceiling_counts_bytes_too(
    profile: SensitivityProfile, tables: dict[str, CostTable]
) -> None:
    choice = np.full(6, 4)
    assignment = Assignment(name="u", kind="uniform", metric="combined", choice=choice)
    made = make_plan(profile, assignment, Budget(max_kl=5.0), tables, {})
    assert made.objective == made.memory_bytes
    assert made.relative_gap == math.inf


def make(profile: SensitivityProfile, tables: dict[str, CostTable], metric: str = "combined") -> Plan:
    budget = Budget(bits_per_weight=4.2, limits={"read_bytes": 1e9})
    return make_plan(profile, find_assignment(profile, budget, tables, metric=metric), budget, tables, {"key": "v"})


def test_numbers_of_a_plan_are_those_of_its_formats(profile: SensitivityProfile, tables: dict[str, CostTable]) -> None:
    made = make(profile, tables)
    formats = {f.name: i for i, f in enumerate(profile.candidates.formats)}
    rows = {unit.name: (u, unit) for u, unit in enumerate(profile.candidates.units)}
    loss = bytes_ = weights = 0.0
    for part in made.units:
        u, unit = rows[part.unit]
        f = formats[part.format]
        assert part.predicted_loss == profile.table("combined").loss[u, f]
        assert part.std_error == profile.table("combined").std_error[u, f]
        assert part.memory_bytes == unit_bytes(unit, profile.candidates.formats[f])
        assert {made.weights[w.name] for w in unit.weights} == {part.format}
        assert part.bits == profile.candidates.formats[f].bits
        loss += part.predicted_loss
        bytes_ += part.memory_bytes
        weights += part.weights
    assert made.predicted_kl == pytest.approx(loss, rel=1e-12)
    assert made.memory_bytes == bytes_ + profile.fixed_bytes == made.use["memory_bytes"]
    assert made.bits_per_weight == pytest.approx(8 * bytes_ / weights, rel=1e-12)
    assert made.bits_per_weight <= 4.2
    assert made.objective == pytest.approx(made.predicted_kl, rel=1e-12)
    assert made.termination == "optimal" and made.relative_gap <= 1e-9
    assert set(made.limits) == set(made.use) == {"memory_bytes", "read_bytes"}
    assert made.provenance == {**profile.provenance, "key": "v"}
    assert made.reference_memory_bytes == profile.reference_bytes


def test_prediction_with_interactions_is_the_sum_over_pairs(
    profile: SensitivityProfile, tables: dict[str, CostTable]
) -> None:
    found = find_assignment(profile, Budget(bits_per_weight=4), tables, metric="fisher")
    additive, full = predicted_kl(profile, found)
    assert profile.logit_gram is not None
    gram = profile.logit_gram.astype(np.float64).mean(axis=0)
    loss = profile.table("fisher").loss
    flat = [u * len(profile.candidates.formats) + int(f) for u, f in enumerate(found.choice)]
    expected = additive
    for a, u in enumerate(flat):
        for b, v in enumerate(flat[:a]):
            size = 2 * math.sqrt(max(loss[a, found.choice[a]], 0) * max(loss[b, found.choice[b]], 0))
            expected += size * gram[u, v] / math.sqrt(gram[u, u] * gram[v, v])
    assert full == pytest.approx(expected, rel=1e-9)


def test_metric_that_predicts_no_kl_lets_the_best_one_predict(
    profile: SensitivityProfile, tables: dict[str, CostTable]
) -> None:
    made = make(profile, tables, "weight_error")
    columns = {f.name: i for i, f in enumerate(profile.candidates.formats)}
    chosen = [columns[unit.format] for unit in made.units]
    assert made.predicted_kl == pytest.approx(profile.table("combined").loss[np.arange(6), chosen].sum())
    assert sum(unit.predicted_loss for unit in made.units) == pytest.approx(made.predicted_kl)
    assert made.objective == pytest.approx(profile.table("weight_error").loss[np.arange(6), chosen].sum())


@pytest.mark.parametrize(("metric", "predicting"), [("combined",) * 2, ("fisher",) * 2, ("weight_error", "combined")])
def test_prediction_is_corrected_by_the_fit_of_the_metric_that_predicts(
    metric: str, predicting: str, profile: SensitivityProfile, tables: dict[str, CostTable]
) -> None:
    fit = profile.prediction_fits[predicting]
    assert fit.plans == 6 and fit.factor != 1
    made = make(profile, tables, metric)
    assert made.corrected_kl == pytest.approx(fit.factor * made.predicted_kl**fit.exponent, rel=1e-12)
    assert made.correction_error == pytest.approx(math.exp(fit.log_error), rel=1e-12)
    others = {name: other for name, other in profile.prediction_fits.items() if name != predicting}
    without = make(replace(profile, prediction_fits=others), tables, metric)
    assert without.corrected_kl is None and without.correction_error is None
    assert without.weights == made.weights


def test_without_any_metric_in_nats_nothing_is_predicted(
    profile: SensitivityProfile, tables: dict[str, CostTable]
) -> None:
    bare = replace(profile, losses={"weight_error": profile.table("weight_error")}, logit_gram=None, prediction_fits={})
    assert default_metric(bare) == "weight_error"
    made = make(bare, tables, "weight_error")
    assert math.isnan(made.predicted_kl) and made.predicted_kl_with_interactions is None
    assert made.corrected_kl is None and made.correction_error is None
    with pytest.raises(ValueError, match=r"a metric in nats/token: got 'weight_error' in squared error"):
        find_assignment(bare, Budget(max_kl=1), tables, metric="weight_error")


def test_cross_terms_that_were_not_measured(profile: SensitivityProfile, tables: dict[str, CostTable]) -> None:
    bare = replace(profile, logit_gram=None)
    with pytest.raises(ValueError, match=r"cross terms must have been measured.*single_unit_kl"):
        find_interacting_assignment(bare, Budget(bits_per_weight=4), tables, metric="fisher")
    assert predicted_kl(bare, find_least_loss(bare, Budget(max_kl=1), tables, metric="fisher"))[1] is None


def test_interacting_assignment_keeps_the_budget(profile: SensitivityProfile, tables: dict[str, CostTable]) -> None:
    budget = Budget(bits_per_weight=4)
    found, shrinkage = find_interacting_assignment(profile, budget, tables, metric="combined")
    assert make_plan(profile, found, budget, tables, {}).bits_per_weight <= 4
    assert found.name == f"combined + interactions x {shrinkage:g}"


def test_unknown_metric(profile: SensitivityProfile, tables: dict[str, CostTable]) -> None:
    with pytest.raises(ValueError, match=r"metric must be one the profile holds: got 'taste', held are .*combined"):
        find_assignment(profile, Budget(bits_per_weight=4), tables, metric="taste")


INFEASIBLE: dict[str, dict[str, Any]] = {
    "memory": {"memory_bytes": 5000.0},
    "bits": {"bits_per_weight": 0.5},
    "memory and others": {"memory_bytes": 5000.0, "limits": {"latency_us": 1e6, "read_bytes": 1e9}},
    "latency": {"bits_per_weight": 16.5, "limits": {"latency_us": 1.0}},
    "kl": {"max_kl": 1e-12},
    "kl and latency": {"max_kl": 1e-12, "limits": {"latency_us": 1e6}},
    "read": {"max_kl": 50.0, "limits": {"read_bytes": 10.0}},
}


@pytest.mark.parametrize("fields", INFEASIBLE.values(), ids=INFEASIBLE)
def test_least_use_of_an_infeasible_budget_is_reached(
    fields: dict[str, Any], profile: SensitivityProfile, tables: dict[str, CostTable]
) -> None:
    with pytest.raises(InfeasibleBudget, match=r"a budget must be reachable: got .*Smallest reachable") as caught:
        find_assignment(profile, Budget(**fields), tables, metric="combined")
    least = caught.value.least_use
    assert least
    reached = {**fields, "limits": {name: max(v, least[name]) for name, v in fields.get("limits", {}).items()}}
    for name in ("memory_bytes", "bits_per_weight", "max_kl"):
        if name in fields:
            reached[name] = max(least[name], fields[name])
    assert reached != fields
    find_assignment(profile, Budget(**reached), tables, metric="combined")
    everything = Everything(profile, tables, "combined")
    for name in set(least) & set(everything.use):
        assert least[name] >= everything.use[name].min() * (1 - 1e-9)


def test_limits_that_cannot_be_kept_together(profile: SensitivityProfile, tables: dict[str, CostTable]) -> None:
    """Narrow formats are slow here: little memory and little latency exclude each other."""
    everything = Everything(profile, tables, "combined")
    wanted = {
        "memory_bytes": middle(everything, "memory_bytes", 0.1),
        "latency_us": middle(everything, "latency_us", 0.1),
    }
    assert not everything.kept(wanted).any()
    with pytest.raises(InfeasibleBudget) as caught:
        find_assignment(profile, Budget(max_kl=9, limits=wanted), tables, metric="combined")
    with pytest.raises(InfeasibleBudget) as caught:
        budget = Budget(memory_bytes=wanted["memory_bytes"], limits={"latency_us": wanted["latency_us"]})
        find_assignment(profile, budget, tables, metric="combined")
    for name, other in (("memory_bytes", "latency_us"), ("latency_us", "memory_bytes")):
        kept = everything.use[other] <= wanted[other]
        assert caught.value.least_use[name] == pytest.approx(everything.use[name][kept].min(), rel=1e-9)


def test_limit_on_memory_holds_under_a_ceiling_on_loss(
    profile: SensitivityProfile, tables: dict[str, CostTable]
) -> None:
    ceiling = Budget(max_kl=1e-3)
    smallest = make_plan(profile, find_assignment(profile, ceiling, tables, metric="combined"), ceiling, tables, {})
    find_assignment(
        profile, Budget(max_kl=1e-3, limits={"memory_bytes": smallest.memory_bytes}), tables, metric="combined"
    )
    tight = Budget(max_kl=1e-3, limits={"memory_bytes": smallest.memory_bytes - 1})
    with pytest.raises(InfeasibleBudget) as caught:
        find_assignment(profile, tight, tables, metric="combined")
    assert caught.value.least_use["memory_bytes"] == smallest.memory_bytes
    assert caught.value.least_use["max_kl"] > 1e-3


@pytest.mark.parametrize("find", [find_least_loss, find_interacting_assignment])
def test_infeasible_limits_of_other_searches(
    find: Any, profile: SensitivityProfile, tables: dict[str, CostTable]
) -> None:
    with pytest.raises(InfeasibleBudget, match="Smallest reachable values"):
        find(profile, Budget(memory_bytes=10), tables, metric="combined")


def test_a_profile_of_another_estimator_alone_plans_by_it(profile: SensitivityProfile) -> None:
    table = replace(profile.table("weight_error"), unit_of_measure="kurtosis x noise / signal power")
    only = replace(profile, losses={"kurtosis": table}, fisher_sketch=None, logit_gram=None, prediction_fits={})
    assert default_metric(only) == "kurtosis"
    made = allocator.plan(only, Budget(bits_per_weight=6), verify=False)
    assert made.metric == "kurtosis"
    assert math.isnan(made.predicted_kl) and made.corrected_kl is None


def test_a_draft_under_several_limits_is_feasible_and_states_its_gap(
    profile: SensitivityProfile, tables: dict[str, CostTable]
) -> None:
    everything = Everything(profile, tables, "combined")
    limits = {"latency_us": middle(everything, "latency_us", 0.4)}
    budget = Budget(memory_bytes=middle(everything, "memory_bytes", 0.4), limits=limits)
    draft = find_assignment(profile, budget, tables, metric="combined", draft=True).result
    exact = find_assignment(profile, budget, tables, metric="combined").result
    assert draft is not None and exact is not None
    best = everything.loss[everything.kept(resolve_limits(profile, budget))].min()
    assert exact.objective == pytest.approx(best, rel=1e-8)
    assert draft.lower_bound <= best * (1 + 1e-9) <= draft.objective * (1 + 2e-9)
