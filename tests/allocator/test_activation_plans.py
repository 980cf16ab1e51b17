"""Weights and activations under a limit on bit operations: optimal, counted by hand, measured as simulated, applied."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import allocator
import runtime.transformers_quantizer  # noqa: F401  registers the method of packed models
from allocator.artefacts import assignment_of_plan
from allocator.assignments import keep_best_activations, list_uniform
from allocator.budget import BIT_OPERATIONS, Budget, InfeasibleBudget, parse_limits
from allocator.measuring import MeasureRequest
from allocator.paired import pair_problem
from allocator.plan_files import load_plan, save_plan
from allocator.planning import find_assignment
from allocator.plans import Plan
from allocator.problems import build_cost_tables, pose_problem
from allocator.store import Store
from runtime.activation_names import activation_name
from runtime.apply import simulated_formats
from runtime.bit_operations import PairedCost
from runtime.kernels.dispatch import kernel_path
from runtime.loading import load_reference
from runtime.simulated_activations import simulated_activations
from sensitivity.activation_losses import join_activations
from sensitivity.profile import SensitivityProfile
from solvers import AllocationProblem, solve
from tests.tiny_measurements import make_request

ACTIVATIONS = ("int4_token", "int8_tensor_static", "bf16")
TOKENS = torch.arange(2, 34)[None]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def measured(tiny_llama_dir: Path, tiny_text: Path, store: Store) -> SensitivityProfile:
    request: MeasureRequest = make_request(tiny_text, activation_formats=ACTIVATIONS)
    return allocator.measure(str(tiny_llama_dir), request=request, store=store)


@pytest.fixture(scope="module")
def limit(measured: SensitivityProfile) -> float:
    """A third of the operations of 8-bit weights and 16-bit activations."""
    table = build_cost_tables(join_activations(measured))[BIT_OPERATIONS]
    candidates = join_activations(measured).candidates
    choice = np.array(
        [candidates.format_index("int8_g64" if unit.kind != "activation" else "bf16") for unit in candidates.units]
    )
    return table.use(choice) / 3


@pytest.fixture(scope="module")
def plan(tiny_llama_dir: Path, measured: SensitivityProfile, limit: float, store: Store) -> Plan:
    budget = Budget(memory_bytes=120_000, limits={BIT_OPERATIONS: limit})
    return allocator.plan(str(tiny_llama_dir), budget, profile=measured, store=store)


def operations_by_hand(plan: Plan, profile: SensitivityProfile) -> float:
    assert plan.activations is not None
    bits = {"int4_token": 4, "int8_tensor_static": 8, "bf16": 16}
    total = 0.0
    for unit in profile.candidates.units:
        for weight in unit.weights:
            own = plan.activations.formats.get(activation_name(weight.parameter.removesuffix(".weight")))
            width = profile.candidates.formats[profile.candidates.format_index(plan.weights[weight.name])].bits
            # The tiny model's head is its own: a lookup in the embedding multiplies nothing.
            multiplied = 0 if weight.kind == "embedding" and not weight.aliases else weight.weight_count
            total += multiplied * width * (16 if own is None else bits[own])
    return total


def test_a_plan_keeps_both_limits_and_counts_what_it_says(
    plan: Plan, measured: SensitivityProfile, limit: float
) -> None:
    assert plan.activations is not None
    assert plan.activations.bit_operations == pytest.approx(operations_by_hand(plan, measured), rel=1e-12)
    assert plan.activations.bit_operations == plan.use[BIT_OPERATIONS] <= limit
    assert plan.memory_bytes <= 120_000
    assert set(plan.activations.formats) == {
        activation_name(w.parameter.removesuffix(".weight"))
        for unit in measured.candidates.units
        for w in unit.weights
        if w.kind == "linear"
    }
    # Both kinds of units gave something.
    assert len(set(plan.activations.formats.values())) > 1
    static = {name for name, f in plan.activations.formats.items() if f == "int8_tensor_static"}
    assert set(plan.activations.scales) == static and all(len(s) == 1 for s in plan.activations.scales.values())
    assert sum(u.predicted_loss for u in plan.units) + plan.activations.predicted_loss == pytest.approx(
        plan.predicted_kl
    )
    assert plan.fixed_bytes == measured.fixed_bytes


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), share=st.floats(0.05, 0.95), memory_share=st.floats(0.2, 1.0))
def test_pairs_are_solved_exactly(seed: int, share: float, memory_share: float) -> None:
    """Against every choice of three weights, two of which read activations, by the definition of the product."""
    rng = np.random.default_rng(seed)
    U, F = 5, 4  # formats 0 and 1 are of weights, 2 and 3 of activations
    allowed = np.zeros((U, F), dtype=bool)
    allowed[:3, :2] = allowed[3:, 2:] = True
    loss, memory = rng.uniform(0, 1, (U, F)), np.where(np.arange(U)[:, None] < 3, rng.integers(1, 20, (U, F)), 0.0)
    multiplications, width = rng.integers(1, 9, 3).astype(float), np.array([2.0, 4.0])
    bits, partner = np.array([16.0, 16.0, 4.0, 8.0]), np.array([3, -1, 4, -1, -1])
    cost = np.zeros((U, F))
    cost[:3, :2] = 16 * multiplications[:, None] * width
    table = PairedCost(
        resource=BIT_OPERATIONS,
        cost=cost,
        fixed=0.0,
        unit_of_measure="bit operations",
        source="exact",
        partner=partner,
        activation_bits=bits,
        unquantized=np.zeros(F, dtype=bool),
    )
    choices = np.array(list(itertools.product(*[np.flatnonzero(row) for row in allowed])))

    def operations(choice: np.ndarray) -> float:
        widths = width[choice[:3]]
        return float(sum(multiplications * widths * [bits[choice[3]], 16.0, bits[choice[4]]]))

    uses = np.array([[memory[np.arange(U), c].sum() for c in choices], [operations(c) for c in choices]])
    np.testing.assert_allclose([table.use(c) for c in choices], uses[1])
    limits = uses.min(axis=1) + np.array([memory_share, share]) * (uses.max(axis=1) - uses.min(axis=1))
    problem = AllocationProblem(
        loss=loss,
        cost=np.stack([memory, cost]),
        limit=limits,
        allowed=allowed,
        resources=("memory_bytes", BIT_OPERATIONS),
    )
    paired = pair_problem(problem, table)
    result = solve(paired.problem)
    losses = loss[np.arange(U), choices].sum(axis=1)
    fits = (uses <= limits[:, None] * (1 + 1e-12)).all(axis=0)
    if not fits.any():
        assert result.choice is None
        return
    assert result.choice is not None
    choice = paired.read(result.choice)
    assert losses[fits].min() == pytest.approx(result.objective, rel=1e-9)
    assert loss[np.arange(U), choice].sum() == pytest.approx(result.objective, rel=1e-9)
    assert allowed[np.arange(U), choice].all() and operations(choice) <= limits[1] * (1 + 1e-12)


def test_unquantized_weights_read_unquantized_activations(measured: SensitivityProfile) -> None:
    joined = join_activations(measured)
    posed = pose_problem(joined, joined.table("fisher").loss, {BIT_OPERATIONS: 1e12}, build_cost_tables(joined))
    assert posed.paired is not None
    names = [f.name for f in joined.candidates.formats]
    for u, k in zip(*np.nonzero(posed.problem.allowed), strict=True):
        if posed.paired.partner[u] >= 0:
            weights, activations = divmod(int(k), len(posed.paired.seconds))
            assert names[weights] != "bf16" or names[posed.paired.seconds[activations]] == "bf16"


def test_a_tighter_limit_costs_loss_and_none_costs_nothing(measured: SensitivityProfile, limit: float) -> None:
    joined = join_activations(measured)
    tables = build_cost_tables(joined)
    losses = []
    for factor in (0.6, 1.0, 2.0, 100.0):
        budget = Budget(memory_bytes=120_000, limits={BIT_OPERATIONS: factor * limit})
        found = find_assignment(joined, budget, tables, metric="fisher")
        assert found.result is not None
        losses.append(found.result.objective)
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]
    alone = find_assignment(measured, Budget(memory_bytes=120_000), build_cost_tables(measured), metric="fisher")
    assert alone.result is not None
    # bf16 activations lose a little themselves.
    bf16 = join_activations(measured).table("fisher").loss[len(measured.candidates.units) :, -1].sum()
    assert losses[-1] <= alone.result.objective + bf16 + 1e-12


def test_unreachable_operations_are_named(measured: SensitivityProfile) -> None:
    joined = join_activations(measured)
    budget = Budget(memory_bytes=120_000, limits={BIT_OPERATIONS: 1.0})
    with pytest.raises(InfeasibleBudget, match=r"bit_operations \d+") as caught:
        find_assignment(joined, budget, build_cost_tables(joined), metric="fisher")
    least = caught.value.least_use[BIT_OPERATIONS]
    again = Budget(memory_bytes=120_000, limits={BIT_OPERATIONS: least * (1 + 1e-9)})
    assert find_assignment(joined, again, build_cost_tables(joined), metric="fisher").result is not None


def test_the_measured_kl_is_that_of_weights_and_activations_together(
    plan: Plan, measured: SensitivityProfile, tiny_llama_dir: Path, store: Store
) -> None:
    model = load_reference(str(tiny_llama_dir)).model
    tokens = torch.from_numpy(measured.evaluation_tokens)
    assert plan.activations is not None
    with torch.no_grad():
        log_p = torch.log_softmax(model(tokens, use_cache=False).logits.double(), dim=-1)
        with simulated_formats(model, plan.weights), simulated_activations(model, plan.activations.scheme):
            log_q = torch.log_softmax(model(tokens, use_cache=False).logits.double(), dim=-1)
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    rows = allocator.evaluate(str(tiny_llama_dir), plan, store=store)
    shipped = next(row for row in rows if row.shipped)
    # A sum of 320 float32 terms.
    assert shipped.kl == pytest.approx(expected, rel=1e-3, abs=2e-6)
    assert all("activations" in row.name for row in rows if row.kind == "uniform")


def test_uniform_rivals_have_one_format_for_all_activations(measured: SensitivityProfile) -> None:
    joined = join_activations(measured)
    uniform = list_uniform(joined.candidates, "fisher")
    own = [set(a.formats_by_activation(joined.candidates).values()) for a in uniform]
    assert {next(iter(formats)) for formats in own} == set(ACTIVATIONS) and all(len(f) == 1 for f in own)
    best = keep_best_activations(uniform, joined, "fisher")
    assert len(best) * len(ACTIVATIONS) == len(uniform)


def test_a_packed_model_reads_as_it_was_measured(
    plan: Plan, tiny_llama_dir: Path, store: Store, tmp_path: Path
) -> None:
    applied = allocator.apply(str(tiny_llama_dir), plan, tmp_path / "packed", store=store)
    assert applied.file_bytes == applied.predicted_bytes == plan.file_bytes
    packed, _ = allocator.load(applied.directory)
    model = load_reference(str(tiny_llama_dir)).model
    assert plan.activations is not None
    with torch.no_grad(), simulated_formats(model, plan.weights):
        without = model(TOKENS, use_cache=False).logits
        with simulated_activations(model, plan.activations.scheme):
            expected = model(TOKENS, use_cache=False).logits
    # The kernels' products differ in the fourth digit, enough to round an activation otherwise.
    with torch.no_grad(), kernel_path("reference"):
        assert torch.equal(packed(TOKENS, use_cache=False).logits, expected)
        loaded = AutoModelForCausalLM.from_pretrained(applied.directory)
        assert torch.equal(loaded(TOKENS, use_cache=False).logits, expected)
    assert not torch.equal(without, expected)


def test_plans_are_kept_and_read(plan: Plan, measured: SensitivityProfile, tmp_path: Path) -> None:
    save_plan(plan, tmp_path / "plan.json")
    read = load_plan(tmp_path / "plan.json")
    assert read.activations == replace(
        plan.activations, scales={k: list(v) for k, v in plan.activations.scales.items()}
    )
    again = assignment_of_plan(join_activations(measured), read)
    assert again.formats_by_activation(join_activations(measured).candidates) == plan.activations.formats
    assert "scales" not in json.dumps(plan.header_metadata())
    assert plan.activations.describe().startswith("activations: ")


def test_a_report_names_the_activations(plan: Plan, tiny_llama_dir: Path, store: Store, tmp_path: Path) -> None:
    page = allocator.report(str(tiny_llama_dir), plan, tmp_path / "report", store=store)
    assert "bit operations a token" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("options", [{"refine": 2}, {"evolve": 2}, {"engine": "vllm"}])
def test_what_does_not_go_with_operations(options: dict, measured: SensitivityProfile) -> None:
    budget = Budget(memory_bytes=120_000, limits={BIT_OPERATIONS: 1e9})
    with pytest.raises(ValueError, match="a limit on bit operations is kept by the solve alone"):
        allocator.plan(measured, budget, **options)


def test_metrics_without_nats_say_nothing_of_activations(measured: SensitivityProfile) -> None:
    joined = join_activations(measured)
    budget = Budget(memory_bytes=120_000, limits={BIT_OPERATIONS: 1e9})
    with pytest.raises(ValueError, match="a plan with a cache or activations needs a metric in nats/token"):
        find_assignment(joined, budget, build_cost_tables(joined), metric="weight_error")


def test_limits_are_plain_numbers() -> None:
    assert parse_limits(["bit_operations=8e9"]) == {BIT_OPERATIONS: 8e9}
    with pytest.raises(
        ValueError, match=r"a limit on bit operations must be a plain number of operations a token: got 'x'"
    ):
        parse_limits(["bit_operations=x"])


def test_posed_without_activations_is_the_problem_itself(measured: SensitivityProfile) -> None:
    posed = pose_problem(measured, measured.table("fisher").loss, {}, build_cost_tables(measured))
    assert posed.paired is None and posed.problem.n_units == len(measured.candidates.units)


def test_a_prefix_is_searched_for_weights_and_activations_together(
    plan: Plan, tiny_llama_dir: Path, store: Store, measured: SensitivityProfile
) -> None:
    found = allocator.find_prefix(str(tiny_llama_dir), plan, length=1, candidates=1, store=store)
    model = load_reference(str(tiny_llama_dir)).model
    assert plan.activations is not None
    tokens = torch.from_numpy(measured.calibration_tokens)[:4, :128]
    with torch.no_grad():
        log_p = torch.log_softmax(model(tokens, use_cache=False).logits.double(), dim=-1)
        with simulated_formats(model, plan.weights), simulated_activations(model, plan.activations.scheme):
            log_q = torch.log_softmax(model(tokens, use_cache=False).logits.double(), dim=-1)
    # The search starts at the plan without a prefix; a sum of 320 float32 terms.
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert found.search_kl[0] == pytest.approx(expected, rel=1e-3, abs=2e-6)
