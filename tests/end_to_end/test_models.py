"""The whole line on every kind of model: measure, plan for each kind of goal, apply, reload, evaluate, report."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import allocator
from allocator import Budget, Plan, SensitivityProfile, Store
from allocator.artefacts import Model, assignment_of_plan
from allocator.assignments import list_uniform, pick, use_of
from allocator.problems import build_cost_tables
from allocator.progress import silent
from allocator.timings import find_latency
from runtime.apply import simulated_formats
from runtime.kernels.dispatch import kernel_path
from tests.tiny_measurements import make_request

MODELS = ("tiny_llama_dir", "tiny_tied_llama_dir", "tiny_mixtral_dir", "tiny_qwen_moe_dir")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model, its profile, and the store of both."""

    model: Model
    profile: SensitivityProfile
    store: Store

    def plan(self, budget: Budget, *, verify: bool = False) -> Plan:
        return allocator.plan(self.model, budget, profile=self.profile, store=self.store, verify=verify)


@pytest.fixture(scope="module", params=MODELS)
def measured(request: pytest.FixtureRequest, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    model, store = Model(str(request.getfixturevalue(request.param))), Store(tmp_path_factory.mktemp("store"))
    profile = allocator.measure(model, request=make_request(tiny_text), store=store)
    return Measured(model=model, profile=profile, store=store)


@pytest.fixture(scope="module")
def plan(measured: Measured) -> Plan:
    return measured.plan(Budget(bits_per_weight=4.6), verify=True)


def test_plan_is_the_best_measured(plan: Plan) -> None:
    assert plan.shipped is not None
    assert plan.shipped.kl == min(e.kl for e in plan.evaluations)
    assert {e.kind for e in plan.evaluations} == {"plan", "uniform"}
    assert all(e.bits_per_weight <= 4.6 for e in plan.evaluations)
    assert plan.name in plan.verdict


def test_reloaded_model_is_the_simulated_one_to_the_bit(measured: Measured, plan: Plan, tmp_path: Path) -> None:
    applied = allocator.apply(measured.model, plan, tmp_path / "packed")
    assert applied.file_bytes == (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert applied.file_bytes == applied.predicted_bytes == plan.memory_bytes
    packed, tokenizer = allocator.load(tmp_path / "packed")
    tokens = tokenizer("The compiler reads a source file and writes", return_tensors="pt").input_ids
    reference = measured.model.reference.model
    with torch.no_grad(), kernel_path("reference"):
        with simulated_formats(reference, plan.weights):
            expected = reference(tokens, use_cache=False).logits
        assert torch.equal(packed(tokens, use_cache=False).logits, expected)
        assert not torch.equal(reference(tokens, use_cache=False).logits, expected)
    # A second time over the first.
    assert allocator.apply(measured.model, plan, tmp_path / "packed").file_bytes == plan.memory_bytes


def test_file_with_long_texts_in_its_header_has_the_same_size(measured: Measured, plan: Plan, tmp_path: Path) -> None:
    long = replace(plan, budget="ü" * 9000, provenance={**plan.provenance, "calibration": "/path" * 3000})
    assert allocator.apply(measured.model, long, tmp_path / "packed").file_bytes == plan.memory_bytes


def test_memory_budget_is_kept_by_the_file(measured: Measured, tmp_path: Path) -> None:
    frontier = allocator.frontier(measured.profile, points=4)
    budget = Budget(memory_bytes=(frontier[1]["memory_bytes"] + frontier[2]["memory_bytes"]) / 2)
    made = measured.plan(budget)
    applied = allocator.apply(measured.model, made, tmp_path / "packed")
    assert applied.file_bytes == made.memory_bytes <= (budget.memory_bytes or 0)


def test_limits_on_latency_and_bytes_read(measured: Measured) -> None:
    """As fast as uniform 8 bits on this machine, whatever that is, and no more bytes read than it."""
    tables = build_cost_tables(measured.profile, find_latency(measured.profile, measured.store, silent))
    uniform = {a.name: a for a in list_uniform(measured.profile.candidates, "combined")}["uniform int8_g64"]
    limits = {name: use for name, use in use_of(uniform.choice, tables).items() if name != "memory_bytes"}
    assert set(limits) == {"latency_us", "read_bytes"}
    made = measured.plan(Budget(bits_per_weight=9, limits=limits), verify=True)
    for name, limit in limits.items():
        assert made.use[name] <= limit * (1 + 1e-9)
    assert made.bits_per_weight <= 9
    assert made.shipped is not None
    predicted = measured.plan(Budget(bits_per_weight=9, limits=limits))
    loss = measured.profile.table(predicted.metric).loss
    assert predicted.objective <= pick(loss, uniform.choice).sum() * (1 + 1e-9)
    assert "knapsack" in predicted.solver


def test_ceiling_on_kl_holds_as_measured(measured: Measured) -> None:
    widest = measured.plan(Budget(bits_per_weight=16.5), verify=True)
    narrow = measured.plan(Budget(bits_per_weight=3.5), verify=True)
    assert widest.shipped is not None and narrow.shipped is not None
    ceiling = (widest.shipped.kl + narrow.shipped.kl) / 2
    made = measured.plan(Budget(max_kl=ceiling), verify=True)
    assert made.shipped is not None and made.shipped.kl <= ceiling
    assert made.memory_bytes == min(e.memory_bytes for e in made.evaluations if e.kl <= ceiling)
    if made.termination == "optimal":
        assert made.objective == made.memory_bytes
        assert measured.profile.fixed_bytes < made.lower_bound <= made.objective


def test_frontier_is_monotone_with_bounds(measured: Measured) -> None:
    points = allocator.frontier(measured.profile, points=12)
    assert len(points) == 12
    for point, next_ in zip(points, points[1:], strict=False):
        assert point["memory_bytes"] <= next_["memory_bytes"]
        assert point["predicted_loss"] >= next_["predicted_loss"]
    for point in points:
        assert point["lower_bound"] <= point["predicted_loss"]
        assert point["predicted_loss"] - point["lower_bound"] <= 1e-6 * abs(point["predicted_loss"])
        assert point["shadow_price_per_mib"] >= 0
        same = measured.plan(Budget(memory_bytes=point["memory_bytes"]))
        assert same.predicted_kl == pytest.approx(point["predicted_loss"], rel=1e-9)


def test_evaluation_is_of_the_text_that_was_kept_apart(measured: Measured, plan: Plan, tiny_text: Path) -> None:
    found = allocator.evaluate(measured.model, plan, store=measured.store)
    reference, shipped, *uniform = found
    assert (reference.kind, reference.kl) == ("reference", 0.0)
    assert reference.tokens == measured.profile.evaluation_tokens.size
    assert shipped.shipped and shipped.memory_bytes == plan.memory_bytes
    assert all(e.kind == "uniform" and not e.shipped and e.memory_bytes <= plan.memory_bytes for e in uniform)
    # With a text of one's own, in sequences of one's own.
    own = allocator.evaluate(
        measured.model, plan, text=str(tiny_text), sequences=2, sequence_tokens=20, store=measured.store
    )
    assert {e.tokens for e in own} == {40}
    with pytest.raises(ValueError, match=r"sequences must be at least 2 .*: got 1"):
        allocator.evaluate(measured.model, plan, text=str(tiny_text), sequences=1, store=measured.store)


def test_report(measured: Measured, plan: Plan, tmp_path: Path) -> None:
    page = allocator.report(measured.model, plan, tmp_path / "report", store=measured.store)
    html = page.read_text(encoding="utf-8")
    assert plan.budget in html.replace("&lt;", "<")
    with (tmp_path / "report" / "plan.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["unit"]: row["format"] for row in rows} == {unit.unit: unit.format for unit in plan.units}
    with (tmp_path / "report" / "evaluations.csv").open(encoding="utf-8") as file:
        assert {row["kind"] for row in csv.DictReader(file)} >= {"reference"}


def test_plan_for_other_units(measured: Measured, plan: Plan) -> None:
    lacking = replace(plan, weights=dict(list(plan.weights.items())[1:]))
    with pytest.raises(allocator.ArtefactMismatch, match=r"all weights of a unit one format: unit '"):
        assignment_of_plan(measured.profile, lacking)
