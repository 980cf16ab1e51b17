"""Held-out KL of plans before and after improvement by measurement, on SmolLM2-135M. Writes refinement.md.

The linear layers are allocated and the tied embedding stays at 8 bits, as in the first table of allocation.md: there
plans lose most, and additive predictions are least to be trusted. Evolution (EvoPress) starts from the same plan as
refinement and has as many passes of one sequence as the shorter refinement.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_allocation import EMBEDDING_FORMAT, measured_demo, pin_embedding, width_budget
from machine import describe_machine
from numpy.typing import NDArray

from allocator.artefacts import Model
from allocator.assignments import Assignment, list_uniform
from allocator.evolution import Evolution
from allocator.planning import find_assignment
from allocator.problems import build_cost_tables
from allocator.progress import Progress, shown_progress
from allocator.refinement import Refinement
from allocator.store import Store
from allocator.verification import score_cached
from sensitivity.evaluation import mean_interval
from sensitivity.measure_config import FISHER, WEIGHT_ERROR
from sensitivity.profile import SensitivityProfile

# Bits -> the most rounds of each refinement, and whether evolution runs beside the first.
WIDTHS = {3.0: ((5, 10), True), 3.5: ((2,), False)}
START = "Fisher diagonal"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One budget.

    Args:
        width: Bits of the uniform format, or midway.
        kl: Plan -> [S] KL of each sequence.
        passes: Improved plan -> passes of one sequence.
        changed: Improved plan -> units that have another format than in the start.
    """

    width: float
    kl: Mapping[str, NDArray[np.float64]]
    passes: Mapping[str, int]
    changed: Mapping[str, int]


def main() -> None:
    store = Store()
    with shown_progress() as progress:
        model, profile = measured_demo(store, progress)
        rows = [improve(pin_embedding(profile), width, model, store, progress) for width in WIDTHS]
    text = render(rows)
    (Path(__file__).parent / "refinement.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def improve(profile: SensitivityProfile, width: float, model: Model, store: Store, progress: Progress) -> Row:
    """Returns the measured plans of one budget."""
    tables = build_cost_tables(profile)
    budget = width_budget(profile, tables, width)
    start = find_assignment(profile, budget, tables, metric=FISHER)
    shared = {
        "profile": profile,
        "budget": budget,
        "tables": tables,
        "store": store,
        "progress": progress,
        "load_model": lambda: model.reference.model,
    }
    rounds, beside_evolution = WIDTHS[width]
    improved, passes = {}, {}
    for most in rounds:
        refinement = Refinement(**shared, rounds=most)  # type: ignore[arg-type]
        improved[f"refined, {most} rounds"] = refinement.run(start)
        passes[f"refined, {most} rounds"] = refinement.count.passes
    if beside_evolution:
        evolution = Evolution(**shared, passes=min(passes.values()))  # type: ignore[arg-type]
        improved["evolved"] = evolution.run(start)
        passes["evolved"] = evolution.count.passes
    named: dict[str, Assignment] = {
        "weight error": find_assignment(profile, budget, tables, metric=WEIGHT_ERROR),
        START: start,
        **improved,
    }
    uniform = {a.name: a for a in list_uniform(profile.candidates, FISHER)}
    if width == int(width):
        named["uniform"] = uniform[f"uniform int{int(width)}_g64"]
    scores = score_cached(
        profile,
        {name: a.formats_by_weight(profile.candidates) for name, a in named.items()},
        profile.evaluation_tokens,
        load_model=lambda: model.reference.model,
        store=store,
        progress=progress,
    )
    changed = {name: int(np.sum(start.choice != a.choice)) for name, a in improved.items()}
    return Row(width=width, kl={name: s.kl for name, s in scores.items()}, passes=passes, changed=changed)


def render(rows: list[Row]) -> str:
    """Returns the page."""
    lines = [
        "# Improvement by measurement, SmolLM2-135M",
        "",
        f"Made by `python benchmarks/bench_refinement.py`. Machine: {describe_machine()}.",
        "",
        "KL in nats per token on text that nothing else saw, with half its 95 % interval. The linear layers are "
        f"allocated, the tied embedding stays {EMBEDDING_FORMAT}. Refined: so many rounds from the Fisher plan "
        "(`--refine`). Evolved: EvoPress (`--evolve`) from the same plan, with as many passes of one sequence as the "
        "first refinement (a backward pass counts two). Gain: Fisher plan minus improved, 95 % interval "
        "of the paired difference.",
        "",
        "| bits | plan | KL | gain | × uniform | × weight error | passes | units changed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        names = [name for name in ("uniform", "weight error", START, *row.passes) if name in row.kl]
        lines += [f"| {row.width:g} | {name} | {' | '.join(_cells(row, name))} |" for name in names]
    return "\n".join(lines) + "\n"


def _cells(row: Row, name: str) -> list[str]:
    kl = row.kl[name]
    mean, low, _ = mean_interval(kl)
    gain = "–"
    if name in row.passes:
        gain = "{:.4f} ({:.4f} to {:.4f})".format(*mean_interval(row.kl[START] - kl))
    ratios = [f"{mean / row.kl[n].mean():.3f}" if n in row.kl else "–" for n in ("uniform", "weight error")]
    counts = [str(known.get(name, "–")) for known in (row.passes, row.changed)]
    return [f"{mean:.4f} ± {mean - low:.4f}", gain, *ratios, *counts]


if __name__ == "__main__":
    main()
