"""Plans under an engine's rules: legal as they come, optimal among the legal ones, never better than without."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import allocator
from allocator.budget import Budget
from allocator.engine_rules import restrict_profile
from allocator.problems import build_cost_tables
from allocator.store import Store
from runtime.engine_rules import GATE_UP, QKV, check_legal
from runtime.engines import ENGINES, find_engine
from runtime.loading import load_reference
from runtime.units import find_units
from sensitivity.experts.granularity import merge_candidates
from sensitivity.profile import SensitivityProfile
from tests.tiny_measurements import list_choices

BUDGETS = [Budget(bits_per_weight=bits) for bits in (9.0, 10.5, 12.0)]


def widest_where_needed(profile: SensitivityProfile, engine: str, budget: Budget) -> allocator.Plan:
    return allocator.plan(profile, budget, verify=False, metric="fisher", engine=engine)


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: str(budget.bits_per_weight))
def test_a_plan_is_the_best_legal_one(tiny_profile: SensitivityProfile, tiny_llama_dir: Path, budget: Budget) -> None:
    vllm = find_engine("vllm")
    made = widest_where_needed(tiny_profile, "vllm", budget)
    units = find_units(load_reference(str(tiny_llama_dir)).model, fuse=(QKV, GATE_UP))
    check_legal(vllm, units, made.weights)
    # All legal choices: 4 bits or 16 for four units of each of two layers, nothing for embedding and head.
    restricted = restrict_profile(tiny_profile, vllm)
    choices = list_choices(restricted)
    assert len(choices) == 2**8
    rows = np.arange(choices.shape[1])
    memory = build_cost_tables(restricted)["memory_bytes"]
    kept = memory.cost[rows, choices].sum(axis=1) + memory.fixed <= made.limits["memory_bytes"]
    losses = restricted.table("fisher").loss[rows, choices].sum(axis=1)
    assert made.predicted_kl == pytest.approx(losses[kept].min(), rel=1e-12)
    assert made.relative_gap <= 1e-9


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: str(budget.bits_per_weight))
def test_rules_have_their_price(tiny_profile: SensitivityProfile, budget: Budget) -> None:
    made = widest_where_needed(tiny_profile, "vllm", budget)
    free = allocator.plan(tiny_profile, budget, verify=False, metric="fisher")
    assert free.rules is None
    assert made.rules is not None
    assert made.rules.engine == "vllm"
    assert (made.rules.predicted_kl, made.rules.memory_bytes) == (made.predicted_kl, made.memory_bytes)
    assert (made.rules.unrestricted_kl, made.rules.unrestricted_bytes) == (free.predicted_kl, free.memory_bytes)
    assert made.predicted_kl > free.predicted_kl
    assert f"lose {made.predicted_kl:.4g} nats" in made.rules.describe()


def test_losses_and_inner_products_are_those_of_sums(tiny_profile: SensitivityProfile) -> None:
    vllm = find_engine("vllm")
    restricted = restrict_profile(tiny_profile, vllm)
    merged = merge_candidates(tiny_profile.candidates, engine=vllm)
    allowed = merged.candidates.allowed
    rng = np.random.default_rng(0)
    shape = tiny_profile.candidates.allowed.shape
    # Sketches of which everything else follows: the sum's inner products are the inner products of the sums.
    vectors = rng.standard_normal((2, 5, *shape)) * tiny_profile.candidates.allowed
    flat = vectors.reshape(2, 5, -1)
    given = replace(tiny_profile, logit_gram=np.einsum("hsi,hsj->hij", flat, flat).astype(np.float32))
    sums = merged.sum_table(vectors).reshape(2, 5, -1)
    found = restrict_profile(given, vllm).logit_gram
    # Forty products of numbers below 5, summed in float32: some 1e-5 of rounding.
    np.testing.assert_allclose(found, np.einsum("hsi,hsj->hij", sums, sums), atol=1e-4)
    for name, table in restricted.losses.items():
        fine = tiny_profile.table(name)
        assert not table.loss[~allowed].any()
        qkv = next(m for m, unit in enumerate(restricted.candidates.units) if unit.role.startswith("q_proj"))
        members = np.flatnonzero(merged.member_of == qkv)
        assert len(members) == 3
        np.testing.assert_allclose(table.loss[qkv, 2], fine.loss[members, 2].sum(), rtol=1e-12)
        assert table.measured is None or table.measured.shape == allowed.shape
    assert restricted.fisher_sketch is not None
    assert restricted.fisher_sketch.shape[1:] == allowed.shape


def test_a_verified_plan_keeps_the_rules(
    tiny_profile: SensitivityProfile, tiny_llama_dir: Path, tiny_store: Store
) -> None:
    made = allocator.plan(
        str(tiny_llama_dir), Budget(bits_per_weight=10.0), engine="vllm", profile=tiny_profile, store=tiny_store
    )
    assert made.shipped is not None
    units = find_units(load_reference(str(tiny_llama_dir)).model, fuse=(QKV, GATE_UP))
    check_legal(ENGINES["vllm"], units, made.weights)
    assert made.rules is not None
    # It can be evaluated as any other: its weights' formats are formats of the finer units.
    evaluations = allocator.evaluate(str(tiny_llama_dir), made, store=tiny_store)
    assert [e.kind for e in evaluations][:2] == ["reference", "plan"]


def test_an_engine_and_a_context_are_refused_together(tiny_profile: SensitivityProfile) -> None:
    budget = Budget(memory_bytes=10**6, context=64)
    with pytest.raises(ValueError, match="an engine's rules say nothing of caches: got engine='vllm' .* context=64"):
        allocator.plan(tiny_profile, budget, verify=False, engine="vllm")
