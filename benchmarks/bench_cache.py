"""Weights and KV cache in one budget at several contexts and batches. Writes cache.md.

The budget is a share of the bytes of the 16-bit model with its full 16-bit cache. Beside the plan of one solve stand
what is usually done: the same share for the weights and for the cache, each solved alone, and uniform weights with a
uniform cache. Two models: a small trained mixture, and SmolLM2-135M.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from scipy.stats import spearmanr

from allocator.artefacts import Model
from allocator.assignments import Assignment, cache_use, list_uniform, pick, use_of
from allocator.budget import MEMORY, Budget
from allocator.demo import demo_request
from allocator.demo_model import prepare_demo_model
from allocator.measuring import MeasureRequest
from allocator.pipeline import measure
from allocator.planning import default_metric, find_assignment, predicted_kl
from allocator.problems import build_cost_tables
from allocator.progress import Progress, shown_progress
from allocator.store import Store
from allocator.verification import score_cached
from runtime.costs import CostTable
from sensitivity.cache_losses import join_cache, reference_cache_bytes
from sensitivity.evaluation import SequenceScores, mean_interval
from sensitivity.measure_config import FISHER, MeasureConfig
from sensitivity.profile import SensitivityProfile
from solvers import AllocationProblem, solve

LOADS = ((2048, 1), (2048, 8), (8192, 1), (8192, 8))
MIXTURE = Path(__file__).parents[1] / "tests" / "data" / "small_moe"
ONE_SOLVE, APART, UNIFORM = "one solve", "apart", "uniform"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and what is measured of it.

    Args:
        title: Of its section.
        source: The model.
        request: What is measured.
        shares: Budgets / bytes of the 16-bit model and cache.
        evaluated: Sequences of the evaluation text that plans are measured on.
    """

    title: str
    source: str
    request: MeasureRequest
    shares: tuple[float, ...]
    evaluated: int


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One context, batch and share with its plans.

    Args:
        context: Tokens of each sequence.
        batch: Sequences.
        share: Budget / bytes of the 16-bit model and cache.
        profile: The profile with caches that hold that many tokens.
        plans: Name of the rule -> assignment.
    """

    context: int
    batch: int
    share: float
    profile: SensitivityProfile
    plans: Mapping[str, Assignment]

    @property
    def memory(self) -> CostTable:
        """The bytes of every candidate."""
        return build_cost_tables(self.profile)[MEMORY]


def main() -> None:
    torch.set_num_threads(1)
    store = Store()
    sections = [introduction()]
    with shown_progress() as progress:
        for case in (small_mixture(), smollm2(store)):
            sections.append(run_case(case, store, progress))
            # The first takes seconds, the second minutes: what is there is shown.
            (Path(__file__).parent / "cache.md").write_text("\n".join(sections), encoding="utf-8")
    sys.stdout.write("\n".join(sections))


def small_mixture() -> Case:
    """Returns the small trained mixture of the tests: seconds."""
    config = MeasureConfig(
        metrics=(FISHER,),
        fisher_sequences=48,
        logit_sequences=8,
        logit_sequence_tokens=128,
        fit_plans=None,
        selection_sequences=2,
        evaluation_sequences=6,
        evaluation_sequence_tokens=256,
    )
    request = MeasureRequest(
        calibration=str(MIXTURE / "calibration.jsonl"),
        evaluation=str(MIXTURE / "evaluation.jsonl"),
        cache_formats=("int2_t32", "int2_g32", "int3_t32", "int3_g32", "int4_t32", "int4_g32", "int8_channel", "bf16"),
        config=config,
    )
    title = "A small trained mixture of experts (`tests/data/small_moe`, 3.5 million parameters)"
    return Case(title=title, source=str(MIXTURE), request=request, shares=(0.2, 0.3, 0.4), evaluated=6)


def smollm2(store: Store) -> Case:
    """Returns the demonstration's model, texts and measurement (that of ``bench_allocation.py``)."""
    request = demo_request(store)
    request = replace(request, config=replace(request.config, logit_passes=None))
    return Case(
        title="SmolLM2-135M",
        source=str(prepare_demo_model(store.root)),
        request=replace(request, cache_formats=("int3_t32", "int4_t32", "int8_channel")),
        shares=(0.3,),
        evaluated=4,
    )


def run_case(case: Case, store: Store, progress: Progress) -> str:
    """Returns the section of a model, measured or taken from the store."""
    model = Model(case.source)
    profile = measure(model, request=case.request, store=store, progress=progress)
    scenarios = [make_scenario(profile, *pair, share) for share in case.shares for pair in LOADS]
    scores: dict[str, SequenceScores] = {}
    tokens = profile.evaluation_tokens[: case.evaluated]
    for i, scenario in enumerate(scenarios):
        # One after the other: what is scored is kept, and an interrupt loses one scenario.
        candidates = scenario.profile.candidates
        scores |= score_cached(
            profile,
            {f"{i} {name}": plan.formats_by_name(candidates) for name, plan in scenario.plans.items()},
            tokens,
            load_model=lambda: model.reference.model,
            store=store,
            progress=progress,
        )
    return render(case.title, profile, tokens, scenarios, scores)


def make_scenario(measured: SensitivityProfile, context: int, batch: int, share: float) -> Scenario:
    """Returns the plans of one context, batch and share of the 16-bit bytes."""
    profile = join_cache(measured, context=context, batch=batch)
    tables = build_cost_tables(profile)
    limit = share * profile.reference_bytes
    budget = Budget(memory_bytes=limit, context=context, batch=batch)
    plans = {ONE_SOLVE: find_assignment(profile, budget, tables, metric=default_metric(profile))}
    apart = solve_apart(profile, tables[MEMORY], share)
    if apart is not None:
        plans[APART] = apart
    fitting = [
        a
        for a in list_uniform(profile.candidates, default_metric(profile))
        if use_of(a.choice, tables)[MEMORY] <= limit
    ]
    if fitting:
        plans[UNIFORM] = min(fitting, key=lambda a: predicted_kl(profile, a)[0])
    return Scenario(context=context, batch=batch, share=share, profile=profile, plans=plans)


def solve_apart(profile: SensitivityProfile, memory: CostTable, share: float) -> Assignment | None:
    """Returns weights and caches solved each under the share of their own bytes; None where one does not fit."""
    caches = np.array([unit.cache_shape is not None for unit in profile.candidates.units])
    cache_bytes = reference_cache_bytes(profile)
    limits = ((~caches, share * (profile.reference_bytes - cache_bytes) - memory.fixed), (caches, share * cache_bytes))
    choice = np.zeros(len(caches), dtype=np.int64)
    for rows, limit in limits:
        problem = AllocationProblem(
            loss=profile.table(default_metric(profile)).loss[rows],
            cost=memory.cost[None, rows],
            limit=np.array([limit]),
            allowed=profile.candidates.allowed[rows],
            resources=(MEMORY,),
        )
        result = solve(problem)
        if result.choice is None:
            return None
        choice[rows] = result.choice
    return Assignment(name=APART, kind="plan", metric=FISHER, choice=choice)


def introduction() -> str:
    """Returns what the page is about."""
    lines = [
        "# Weights and KV cache in one budget",
        "",
        f"Made by `python benchmarks/bench_cache.py`. Machine: {describe_machine()}.",
        "",
        f"Budget: a share of the 16-bit model and its full 16-bit cache. *{ONE_SOLVE}*: weights and cache in one "
        f"budget; *{APART}*: the same share for each, solved alone; *{UNIFORM}*: of the uniform formats that fit, each "
        "with a cache of its own format and of 8 bits or more, the one that is predicted best. Bits: stored bits per "
        "weight, and per number cached. KL in nats per token on text that nothing else saw, every token decoded from "
        "the quantized cache. The context prices bytes alone: the measured sequences are shorter than it.",
        "",
    ]
    return "\n".join(lines)


def render(
    title: str,
    profile: SensitivityProfile,
    tokens: np.ndarray,
    scenarios: list[Scenario],
    scores: Mapping[str, SequenceScores],
) -> str:
    """Returns the section of one model as Markdown."""
    lines = [
        f"## {title}",
        "",
        f"Metric of the weights: {default_metric(profile)}. Measured on {len(tokens)} x {tokens.shape[1]} "
        "tokens; caches alone on 2 sequences of the calibration text.",
        "",
        "| share | context | batch | plan | MiB | weights MiB | cache MiB | bits of weights | of keys | of values | "
        "predicted KL | measured KL (95 %) |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    pairs = []
    for i, scenario in enumerate(scenarios):
        for name, plan in scenario.plans.items():
            kl = scores[f"{i} {name}"].kl
            pairs.append((predicted_kl(scenario.profile, plan)[0], float(kl.mean()), name))
            lines.append(render_row(scenario, name, plan, pairs[-1][0], kl))
    lines += ["", *render_order(pairs), "", *render_formats(scenarios)]
    return "\n".join(lines) + "\n"


def render_row(scenario: Scenario, name: str, plan: Assignment, predicted: float, kl: np.ndarray) -> str:
    memory, candidates = scenario.memory, scenario.profile.candidates
    stored = pick(memory.cost, plan.choice)
    cache = cache_use(candidates, plan.choice, memory)
    bits = []
    for role in ("key_cache", "value_cache"):
        rows = [u for u, unit in enumerate(candidates.units) if unit.role == role]
        numbers = (
            sum(math.prod(candidates.units[u].cache_shape or ()) for u in rows) * scenario.context * scenario.batch
        )
        bits.append(8 * stored[rows].sum() / numbers)
    weights = sum(unit.weight_count for unit in candidates.units)
    mean, low, high = mean_interval(kl)
    return (
        f"| {scenario.share:g} | {scenario.context} | {scenario.batch} | {name} | "
        f"{(stored.sum() + memory.fixed) / 2**20:.1f} | {(stored.sum() - cache + memory.fixed) / 2**20:.1f} | "
        f"{cache / 2**20:.1f} | {8 * (stored.sum() - cache) / weights:.2f} | {bits[0]:.2f} | {bits[1]:.2f} | "
        f"{predicted:.4f} | {mean:.4f} ({low:.4f}–{high:.4f}) |"
    )


def render_order(pairs: list[tuple[float, float, str]]) -> list[str]:
    """Returns how far predictions order the plans as measurements do."""
    predicted, measured, names = zip(*pairs, strict=True)
    lines = [
        f"Spearman correlation of predicted and measured KL over all {len(pairs)} rows: "
        f"{spearmanr(predicted, measured).statistic:.4f}."
    ]
    for name in dict.fromkeys(names):
        own = [i for i, other in enumerate(names) if other == name]
        statistic = spearmanr([predicted[i] for i in own], [measured[i] for i in own]).statistic
        lines[0] += f" Of *{name}* alone ({len(own)} rows): {statistic:.4f}."
    return lines


def render_formats(scenarios: list[Scenario]) -> list[str]:
    """Returns which formats the caches of the plans of one solve get, keys and values apart."""
    lines = [
        f"Formats of the {ONE_SOLVE}, layers of each:",
        "",
        "| share | context | batch | keys | values |",
        "|---|---|---|---|---|",
    ]
    for scenario in scenarios:
        candidates = scenario.profile.candidates
        cells = []
        for role in ("key_cache", "value_cache"):
            chosen = [
                candidates.formats[int(f)].name
                for unit, f in zip(candidates.units, scenario.plans[ONE_SOLVE].choice, strict=True)
                if unit.role == role
            ]
            counts = [f"{f.name} × {chosen.count(f.name)}" for f in candidates.formats if f.name in chosen]
            cells.append(", ".join(counts))
        lines.append(f"| {scenario.share:g} | {scenario.context} | {scenario.batch} | {cells[0]} | {cells[1]} |")
    return lines


if __name__ == "__main__":
    main()
