"""Held-out KL of plans before and after refinement by measurement, on SmolLM2-135M. Writes refinement.md.

The linear layers are allocated and the tied embedding stays at 8 bits, as in the first table of allocation.md: there
plans lose most, and additive predictions are least to be trusted.
"""

import sys
from pathlib import Path

import numpy as np
from bench_allocation import EMBEDDING_FORMAT, measured_demo, pin_embedding, width_budget
from machine import describe_machine

from allocator.assignments import list_uniform
from allocator.planning import find_assignment
from allocator.problems import build_cost_tables
from allocator.progress import shown_progress
from allocator.refinement import Refinement
from allocator.store import Store
from allocator.verification import score_cached
from sensitivity.evaluation import mean_interval
from sensitivity.measure_config import FISHER, WEIGHT_ERROR

WIDTHS = (3.0, 3.5)
ROUNDS = 4


def main() -> None:
    store = Store()
    with shown_progress() as progress:
        model, profile = measured_demo(store, progress)
        pinned = pin_embedding(profile)
        tables = build_cost_tables(pinned)
        rows = []
        for width in WIDTHS:
            budget = width_budget(pinned, tables, width)
            start = find_assignment(pinned, budget, tables, metric=FISHER)
            refinement = Refinement(
                profile=pinned,
                budget=budget,
                tables=tables,
                store=store,
                progress=progress,
                load_model=lambda: model.reference.model,
                rounds=ROUNDS,
            )
            refined = refinement.run(start)
            named = {
                "weight error": find_assignment(pinned, budget, tables, metric=WEIGHT_ERROR),
                "Fisher diagonal": start,
                "refined": refined,
            }
            if width == int(width):
                uniform = {a.name: a for a in list_uniform(pinned.candidates, FISHER)}
                named["uniform"] = uniform[f"uniform int{int(width)}_g64"]
            scores = score_cached(
                pinned,
                {name: a.formats_by_weight(pinned.candidates) for name, a in named.items()},
                pinned.evaluation_tokens,
                load_model=lambda: model.reference.model,
                store=store,
                progress=progress,
            )
            changed = int(np.sum(start.choice != refined.choice))
            rows.append((width, {name: s.kl for name, s in scores.items()}, changed))
    text = render(rows)
    (Path(__file__).parent / "refinement.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def render(rows: list[tuple[float, dict[str, np.ndarray], int]]) -> str:
    """Returns the page."""
    lines = [
        "# Refinement by measurement, SmolLM2-135M",
        "",
        f"Made by `python benchmarks/bench_refinement.py`. Machine: {describe_machine()}.",
        "",
        "KL in nats per token on text that nothing else saw, with half its 95 % interval. The linear layers are "
        f"allocated, the tied embedding stays {EMBEDDING_FORMAT}. Refined: at most {ROUNDS} rounds "
        "from the Fisher plan. Gain: Fisher plan minus refined, 95 % interval of the paired difference.",
        "",
        "| bits | uniform | weight error | Fisher | refined | gain | × uniform | × weight error | changed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for width, kl, changed in rows:
        gain, low, high = mean_interval(kl["Fisher diagonal"] - kl["refined"])
        ratios = [
            f"{kl['refined'].mean() / kl[name].mean():.3f}" if name in kl else "–"
            for name in ("uniform", "weight error")
        ]
        cells = [_cell(kl.get(name)) for name in ("uniform", "weight error", "Fisher diagonal", "refined")]
        lines.append(
            f"| {width:g} | {' | '.join(cells)} | {gain:.4f} ({low:.4f} to {high:.4f}) | {' | '.join(ratios)} | "
            f"{changed} |"
        )
    return "\n".join(lines) + "\n"


def _cell(kl: np.ndarray | None) -> str:
    if kl is None:
        return "–"
    mean, low, _ = mean_interval(kl)
    return f"{mean:.4f} ± {mean - low:.4f}"


if __name__ == "__main__":
    main()
