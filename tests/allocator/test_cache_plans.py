"""Weights and caches in one budget: optimal, priced to the byte, measured as decoded, applied, generated, reported."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import allocator
from allocator.artefacts import Model, assignment_of_plan
from allocator.assignments import Assignment, cache_use, keep_widest_caches, list_uniform, use_of
from allocator.budget import Budget
from allocator.evolution import Evolution, SelectionStep
from allocator.expert_blocks import find_block_assignment
from allocator.measuring import MeasureRequest
from allocator.notes import list_notes
from allocator.plan_files import load_plan, save_plan
from allocator.planning import find_assignment, make_plan
from allocator.plans import Evaluation, Plan
from allocator.problems import build_cost_tables
from allocator.refinement import Refinement
from allocator.store import Store
from allocator.tables import make_report
from runtime.apply import simulated_formats
from runtime.cached_attention import simulated_cache
from sensitivity.cache_losses import join_cache
from sensitivity.profile import SensitivityProfile
from tests.allocator.test_notes import evaluation_of
from tests.tiny_measurements import BATCH, CACHE_BUDGET, CACHE_FORMATS, CONTEXT, list_choices


def keep_few(profile: SensitivityProfile) -> SensitivityProfile:
    """Returns a joined profile of three weights and three caches, so that all choices can be listed."""
    units = profile.candidates.units
    kept = np.array([0, 2, 5, len(units) - 4, len(units) - 2, len(units) - 1])
    candidates = replace(
        profile.candidates, units=tuple(units[u] for u in kept), allowed=profile.candidates.allowed[kept], reasons={}
    )
    losses = {
        name: replace(t, loss=t.loss[kept], std_error=t.std_error[kept], measured=None)
        for name, t in profile.losses.items()
    }
    return replace(profile, candidates=candidates, losses=losses, fisher_sketch=None, logit_gram=None)


@pytest.mark.parametrize(("context", "batch"), [(1, 1), (96, 1), (96, 4), (2048, 8)])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_one_budget_is_solved_exactly(
    share: float, context: int, batch: int, cache_profile: SensitivityProfile
) -> None:
    few = keep_few(join_cache(cache_profile, context=context, batch=batch))
    choices, units = list_choices(few), np.arange(6)
    tables = build_cost_tables(few)
    # Priced here by hand: the tables are under test as well.
    use = np.full(few.candidates.allowed.shape, np.nan)
    for u, f in zip(*np.nonzero(few.candidates.allowed), strict=True):
        unit, format_ = few.candidates.units[u], few.candidates.formats[f]
        rows = [weight.shape for weight in unit.weights]
        if unit.cache_shape is not None:
            rows = [(context * batch * unit.cache_shape[0], unit.cache_shape[1])]
        use[u, f] = sum(format_.storage_bytes(shape) for shape in rows)
    uses = use[units, choices].sum(axis=1) + few.fixed_bytes
    losses = few.table("combined").loss[units, choices].sum(axis=1)
    limit = uses.min() + share * (uses.max() - uses.min())
    budget = Budget(memory_bytes=float(limit), context=context, batch=batch)
    found = find_assignment(few, budget, tables, metric="combined")
    assert found.result is not None
    assert found.result.objective == pytest.approx(losses[uses <= limit * (1 + 1e-12)].min(), rel=1e-9)
    assert use_of(found.choice, tables)["memory_bytes"] <= limit


def test_bytes_of_a_plan_are_those_of_file_and_cache(cache_plan: Plan, cache_profile: SensitivityProfile) -> None:
    joined = join_cache(cache_profile, context=CONTEXT, batch=BATCH)
    assert cache_plan.cache is not None
    assert (cache_plan.cache.context, cache_plan.cache.batch) == (CONTEXT, BATCH)
    assert cache_plan.memory_bytes == cache_plan.file_bytes + cache_plan.cache.memory_bytes <= 150_000
    assert cache_plan.cache.memory_bytes == sum(
        u.memory_bytes for u in cache_plan.units if u.unit in cache_plan.cache.formats
    )
    weights = sum(unit.weight_count for unit in cache_profile.candidates.units)
    assert cache_plan.bits_per_weight == pytest.approx(
        8 * (cache_plan.file_bytes - cache_profile.fixed_bytes) / weights
    )
    assert cache_plan.reference_memory_bytes == joined.reference_bytes
    assert {unit.unit: unit.format for unit in cache_plan.units if unit.weights == 0} == cache_plan.cache.formats
    assert not set(cache_plan.weights) & set(cache_plan.cache.formats)
    own = assignment_of_plan(joined, cache_plan)
    assert use_of(own.choice, build_cost_tables(joined))["memory_bytes"] == cache_plan.memory_bytes


def test_a_longer_context_moves_bytes_from_the_cache_to_the_weights(cache_profile: SensitivityProfile) -> None:
    # A plan of w bytes of weights and c of cache a token is optimal at context n. Priced at a longer m it takes
    # w + m c; if a plan of no more than that had c' > c, then w' <= w - m (c' - c) < w - n (c' - c), so it would have
    # kept the budget at n and could not lose less. So a token's cache never grows.
    contexts = (16, 64, 256, 1024, 4096)
    file_bytes, token_bytes = [], []
    limit = 0.3 * join_cache(cache_profile, context=contexts[0], batch=2).reference_bytes
    for context, longer in zip(contexts, (*contexts[1:], 0), strict=True):
        made = allocator.plan(cache_profile, Budget(memory_bytes=limit, context=context, batch=2), verify=False)
        assert made.cache is not None
        file_bytes.append(made.file_bytes)
        token_bytes.append(made.cache.memory_bytes / context)
        limit = file_bytes[-1] + token_bytes[-1] * longer
    assert token_bytes == sorted(token_bytes, reverse=True)
    assert token_bytes[-1] < token_bytes[0]
    assert file_bytes[-1] > file_bytes[0]


def test_a_step_reads_the_whole_cache(cache_profile: SensitivityProfile) -> None:
    one, many = (join_cache(cache_profile, context=CONTEXT, batch=batch) for batch in (1, 8))
    choice = list_uniform(one.candidates, "combined")[-1].choice
    read = [use_of(choice, build_cost_tables(p, batch_tokens=1))["read_bytes"] for p in (one, many)]
    cache = cache_use(one.candidates, choice, build_cost_tables(one)["memory_bytes"])
    assert read[1] - read[0] == 7 * cache > 0


def test_a_ceiling_on_kl_minimises_file_and_cache(cache_profile: SensitivityProfile) -> None:
    made = allocator.plan(cache_profile, Budget(max_kl=0.02, context=CONTEXT, batch=BATCH), verify=False)
    assert made.cache is not None
    assert made.minimises_memory and made.objective == made.memory_bytes
    assert made.predicted_kl <= 0.02


def test_plans_without_a_context_know_nothing_of_caches(
    cache_profile: SensitivityProfile, tiny_profile: SensitivityProfile
) -> None:
    budget = Budget(memory_bytes=120_000)
    with_caches, without = (allocator.plan(p, budget, verify=False).to_dict() for p in (cache_profile, tiny_profile))
    changing = ("solve_s", "provenance")
    assert json.dumps({k: v for k, v in with_caches.items() if k not in changing}) == json.dumps(
        {k: v for k, v in without.items() if k not in changing}
    )
    assert "cache" not in without


def test_the_measured_kl_is_that_of_the_quantized_cache(
    cache_plan: Plan, tiny_llama_dir: Path, cache_profile: SensitivityProfile
) -> None:
    model = Model(str(tiny_llama_dir)).reference.model
    tokens = torch.from_numpy(cache_profile.selection_tokens)
    assert cache_plan.cache is not None and cache_plan.shipped is not None
    with torch.no_grad():
        log_p = torch.log_softmax(model(tokens, use_cache=False).logits.double(), dim=-1)
        with simulated_formats(model, cache_plan.weights), simulated_cache(model, cache_plan.cache.formats):
            log_q = torch.log_softmax(model(tokens, use_cache=False).logits.double(), dim=-1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert cache_plan.shipped.kl == pytest.approx(kl, rel=1e-3)
    assert cache_plan.shipped.memory_bytes == cache_plan.memory_bytes
    assert cache_plan.shipped.bits_per_weight == pytest.approx(cache_plan.bits_per_weight)


def test_uniform_rivals_have_caches_of_each_width(cache_profile: SensitivityProfile) -> None:
    joined = join_cache(cache_profile, context=CONTEXT, batch=BATCH)
    found = {a.name: a for a in list_uniform(joined.candidates, "combined")}

    def formats_of(name: str) -> set[str]:
        return set(found[name].formats_by_cache(joined.candidates).values())

    memory = build_cost_tables(joined)["memory_bytes"]
    kept = {a.name for a in keep_widest_caches(list(found.values()), joined.candidates, memory)}
    assert "uniform int3_g64, 16-bit cache" in kept
    assert not {"uniform int3_g64", "uniform int3_g64, 8-bit cache"} & kept
    own = list_uniform(cache_profile.candidates, "combined")
    assert keep_widest_caches(own, cache_profile.candidates, build_cost_tables(cache_profile)["memory_bytes"]) == own
    # No weight format is one of a cache but bf16: a cache takes the smallest that is as wide.
    assert formats_of("uniform int3_g64") == {"int4_channel"}
    assert formats_of("uniform int3_g64, 8-bit cache") == {"int8_channel"}
    assert formats_of("uniform int3_g64, 16-bit cache") == {"bf16"}
    assert formats_of("uniform int4_g64, 8-bit embeddings, 8-bit cache") == {"int8_channel"}
    assert formats_of("uniform bf16") == {"bf16"}
    weights = [a.formats_by_weight(joined.candidates) for a in found.values()]
    assert all(len(w) == sum(len(u.weights) for u in cache_profile.candidates.units) for w in weights)


def test_plans_come_back_from_disk(cache_plan: Plan, tmp_path: Path) -> None:
    save_plan(cache_plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == cache_plan
    record = json.loads((tmp_path / "plan.json").read_text())
    assert record["cache"]["formats"]["model.layers.1.self_attn.value_cache"] in CACHE_FORMATS
    assert "formats" not in json.loads(cache_plan.header_metadata()["bitplan.plan"])
    (tmp_path / "plan.json").write_text(json.dumps({**record, "cache": {"context": 3}}))
    with pytest.raises(ValueError, match=r"which is damaged \(TypeError"):
        load_plan(tmp_path / "plan.json")


def test_evaluation_and_report_speak_of_the_cache(
    cache_plan: Plan, tiny_llama_dir: Path, cache_profile: SensitivityProfile, cache_store: Store
) -> None:
    evaluations = allocator.evaluate(str(tiny_llama_dir), cache_plan, store=cache_store)
    by_kind: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        by_kind.setdefault(evaluation.kind, []).append(evaluation)
    assert by_kind["reference"][0].memory_bytes == cache_plan.reference_memory_bytes
    assert by_kind["reference"][0].bits_per_weight == pytest.approx(32.0)
    assert by_kind["plan"][0].memory_bytes == cache_plan.memory_bytes
    assert all(e.memory_bytes <= cache_plan.memory_bytes for e in by_kind["uniform"])
    joined = join_cache(cache_profile, context=CONTEXT, batch=BATCH)
    content = make_report(joined, cache_plan, evaluations, allocator.frontier(joined, points=3, store=cache_store))
    caches = content.plan[content.plan["role"].isin(["key_cache", "value_cache"])]
    # 2 heads of 16 numbers a token: one scale and one zero point a head.
    widths = {"int2_channel": 7 * 8 / 16, "int4_channel": 11 * 8 / 16, "int8_channel": 19 * 8 / 16, "bf16": 16.0}
    assert caches["bits_per_weight"].tolist() == [widths[name] for name in caches["format"]]
    assert set(content.sensitivities["role"]) >= {"key_cache", "value_cache"}
    [note] = [n for n in content.notes if n.startswith("Memory: ")]
    assert f"{cache_plan.file_bytes / 2**20:.2f} MiB of weights" in note
    assert f"at {CONTEXT} tokens and batch {BATCH}" in note


def test_a_report_without_a_cache_does_not_speak_of_one(tiny_profile: SensitivityProfile) -> None:
    made = allocator.plan(tiny_profile, Budget(bits_per_weight=5), verify=False)
    notes = list_notes(tiny_profile, made, [evaluation_of(made, 0.01)])
    assert not any(note.startswith("Memory: ") for note in notes)


def test_weights_that_are_measured_are_not_measured_again(
    tiny_llama_dir: Path, cache_request: MeasureRequest, cache_profile: SensitivityProfile, cache_store: Store
) -> None:
    stages: list[str] = []
    other = replace(cache_request, cache_formats=("int4_channel", "bf16"))
    again = allocator.measure(
        str(tiny_llama_dir), request=other, store=cache_store, progress=lambda stage, *_: stages.append(stage)
    )
    assert set(stages) == {"cache"}
    assert again.fingerprint != cache_profile.fingerprint
    assert cache_profile.cache is not None and again.cache is not None
    np.testing.assert_array_equal(again.cache.table.loss, cache_profile.cache.table.loss[:, [1, 3]])
    np.testing.assert_array_equal(again.table("fisher").loss, cache_profile.table("fisher").loss)


def test_what_cannot_be_planned_with_caches_is_refused(
    cache_profile: SensitivityProfile, tiny_profile: SensitivityProfile, cache_store: Store
) -> None:
    with pytest.raises(ValueError, match="needs the losses of caches: got context=96 and a profile without them"):
        allocator.plan(tiny_profile, CACHE_BUDGET, verify=False)
    with pytest.raises(
        ValueError, match="a plan with a cache or activations needs a metric in nats/token: got 'weight_error' in"
    ):
        allocator.plan(cache_profile, CACHE_BUDGET, verify=False, metric="weight_error")
    with pytest.raises(ValueError, match=r"and a cache has none: got 'memory <= 0.14 MiB, context 96 tokens, batch 4'"):
        Refinement(
            profile=cache_profile,
            budget=CACHE_BUDGET,
            tables={},
            store=cache_store,
            progress=lambda *_: None,
            load_model=lambda: None,
            rounds=1,
        )


def test_a_plan_of_a_rule_prices_its_cache(cache_profile: SensitivityProfile) -> None:
    joined = join_cache(cache_profile, context=CONTEXT, batch=BATCH)
    assignment = next(a for a in list_uniform(joined.candidates, "combined") if a.name == "uniform bf16")
    made = make_plan(joined, assignment, CACHE_BUDGET, build_cost_tables(joined), {})
    assert made.cache is not None
    # 2 layers, keys and values, 2 heads of 16 numbers of 2 bytes.
    assert made.cache.memory_bytes == CONTEXT * BATCH * 2 * 2 * 2 * 16 * 2


def test_evolution_switches_formats_of_caches_too(
    cache_profile: SensitivityProfile, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    joined = join_cache(cache_profile, context=CONTEXT, batch=BATCH)
    tables = build_cost_tables(joined)
    caches = np.array([unit.cache_shape is not None for unit in joined.candidates.units])
    # The narrowest caches beside the widest weights: what is better has other caches.
    narrow, wide = (joined.candidates.format_index(name) for name in ("int2_channel", "bf16"))
    start = np.where(caches, narrow, wide)
    evolution = Evolution(
        profile=joined,
        budget=replace(CACHE_BUDGET, memory_bytes=use_of(start, tables)["memory_bytes"]),
        tables=tables,
        store=Store(tmp_path),
        progress=lambda *_: None,
        load_model=lambda: Model(str(tiny_llama_dir)).reference.model,
        passes=250,
        offspring=6,
        steps=(SelectionStep(sequences=3, survivors=1),),
    )
    given = Assignment(name="narrow caches", kind="plan", metric="combined", choice=start)
    found = evolution.run(given)
    assert (found.choice[caches] != start[caches]).any()
    assert use_of(found.choice, tables)["memory_bytes"] <= evolution.budget.memory_bytes


def test_a_rule_about_experts_leaves_the_cache_to_the_solver(
    tiny_mixtral_dir: Path, cache_request: MeasureRequest, tmp_path: Path
) -> None:
    config = replace(cache_request.config, metrics=("fisher",), fit_plans=None)
    request = replace(cache_request, config=config)
    profile = allocator.measure(str(tiny_mixtral_dir), request=request, store=Store(tmp_path))
    joined = join_cache(profile, context=CONTEXT, batch=BATCH)
    tables = build_cost_tables(joined)
    budget = Budget(memory_bytes=0.3 * joined.reference_bytes, context=CONTEXT, batch=BATCH)
    best = find_assignment(joined, budget, tables, metric="fisher")
    by_blocks = find_block_assignment(joined, budget, tables, best)
    assert by_blocks is not None
    assert by_blocks.formats_by_cache(joined.candidates) == best.formats_by_cache(joined.candidates)
    assert by_blocks.formats_by_weight(joined.candidates) != best.formats_by_weight(joined.candidates)
    assert use_of(by_blocks.choice, tables)["memory_bytes"] <= budget.memory_bytes
