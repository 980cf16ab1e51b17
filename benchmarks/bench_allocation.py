"""Held-out KL of plans by every metric at the bytes of uniform formats, on SmolLM2-135M. Writes allocation.md.

Round-to-nearest, group 64; all rows of a column have equal bytes. First the linear layers alone are allocated, then the
tied embedding as well. Calibration, selection and evaluation text are the demonstration's.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from machine import describe_machine

from allocator.artefacts import Model
from allocator.assignments import Assignment, list_uniform, use_of
from allocator.budget import MEMORY, Budget
from allocator.demo import demo_request
from allocator.demo_model import prepare_demo_model
from allocator.interactions import sketch_from_gram
from allocator.pipeline import measure
from allocator.planning import find_assignment, find_interacting_assignment
from allocator.problems import build_cost_tables, build_problem, resolve_limits
from allocator.progress import Progress, shown_progress
from allocator.store import Store
from allocator.verification import score_cached
from runtime.costs import CostTable
from sensitivity.evaluation import mean_interval
from sensitivity.measure_config import FISHER, OUTPUT_ERROR, SINGLE_UNIT_KL, WEIGHT_ERROR
from sensitivity.profile import SensitivityProfile
from sensitivity.sketches.combination import COMBINED
from solvers import solve

Columns = dict[float, dict[str, Assignment]]
Scores = dict[str, np.ndarray]

EMBEDDING_FORMAT = "int8_g64"
STORED_BITS = (3.5, 4.25)
WIDTHS = (3.0, 3.5, 4.0, 4.5, 5.0)
ROWS = {
    "uniform": "uniform",
    WEIGHT_ERROR: "weight error",
    OUTPUT_ERROR: "Hessian-weighted output error",
    FISHER: "Fisher diagonal",
    SINGLE_UNIT_KL: "single-unit KL",
    COMBINED: "combination (geometric mean of the last two)",
    "fisher_raw": "Fisher sketch, cross terms raw",
    "logit_raw": "logit sketch, cross terms raw",
    "logit_shrunk": "logit sketch, cross terms shrunk by cross-validation",
}


def main() -> None:
    store = Store()
    with shown_progress() as progress:
        model, profile = measured_demo(store, progress)
        pinned = pin_embedding(profile)
        tables = build_cost_tables(profile)
        columns = {width: make_column(pinned, tables, width) for width in WIDTHS}
        free = {width: make_free_column(profile, tables, column) for width, column in columns.items()}
        stored = {bits: make_metric_column(profile, tables, Budget(bits_per_weight=bits)) for bits in STORED_BITS}

        def score(tokens: np.ndarray, columns: Columns) -> Scores:
            named = {f"{width:g} {row}": a for width, column in columns.items() for row, a in column.items()}
            formats = {name: a.formats_by_weight(profile.candidates) for name, a in named.items()}
            scores = score_cached(
                profile, formats, tokens, load_model=lambda: model.reference.model, store=store, progress=progress
            )
            return {name: s.kl for name, s in scores.items()}

        sections = [
            render_table(
                title, part, score(profile.evaluation_tokens, part), score(profile.selection_tokens, part), profile
            )
            for title, part in (
                (f"The linear layers are allocated, the tied embedding stays {EMBEDDING_FORMAT}", columns),
                ("The embedding is a unit like any other; bytes as above", free),
                ("As `--bits-per-weight` counts: stored bits of all units, scales and embedding included", stored),
            )
        ]
    text = "\n".join([*introduction(profile), *sections])
    (Path(__file__).parent / "allocation.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def measured_demo(store: Store, progress: Progress) -> tuple[Model, SensitivityProfile]:
    """Returns the demonstration's model and its profile with every pair measured: cross terms need them all."""
    model = Model(str(prepare_demo_model(store.root)))
    request = demo_request(store)
    request = replace(request, config=replace(request.config, logit_passes=None))
    return model, measure(model, request=request, store=store, progress=progress)


def pin_embedding(profile: SensitivityProfile) -> SensitivityProfile:
    """Returns the profile with embeddings at one format only."""
    allowed = profile.candidates.allowed.copy()
    for u, unit in enumerate(profile.candidates.units):
        if unit.kind in ("embedding", "head"):
            allowed[u] = [f.name == EMBEDDING_FORMAT for f in profile.candidates.formats]
    return replace(profile, candidates=replace(profile.candidates, allowed=allowed))


def width_budget(profile: SensitivityProfile, tables: dict[str, CostTable], width: float) -> Budget:
    """Returns the bytes of uniform formats of a width, group 64; of a half width, midway."""
    uniform = {a.name: a for a in list_uniform(profile.candidates, COMBINED)}
    ends = [uniform[f"uniform int{int(end(width))}_g64"].choice for end in (np.floor, np.ceil)]
    return Budget(memory_bytes=sum(use_of(choice, tables)[MEMORY] for choice in ends) / 2)


def make_metric_column(
    profile: SensitivityProfile, tables: dict[str, CostTable], budget: Budget
) -> dict[str, Assignment]:
    """Returns the additive plans of a budget by metric."""
    metrics = (WEIGHT_ERROR, OUTPUT_ERROR, FISHER, SINGLE_UNIT_KL, COMBINED)
    return {metric: find_assignment(profile, budget, tables, metric=metric) for metric in metrics}


def make_column(profile: SensitivityProfile, tables: dict[str, CostTable], width: float) -> dict[str, Assignment]:
    """Returns the assignments of one byte budget by row; half widths lie midway and have no uniform format."""
    budget = width_budget(profile, tables, width)
    column = {}
    if width == int(width):
        uniform = {a.name: a for a in list_uniform(profile.candidates, COMBINED)}
        column["uniform"] = uniform[f"uniform int{int(width)}_g64"]
    column |= make_metric_column(profile, tables, budget)
    assert profile.fisher_sketch is not None
    assert profile.logit_gram is not None
    fisher = profile.fisher_sketch / np.sqrt(np.float32(len(profile.fisher_sketch)))
    logit = sketch_from_gram(profile.logit_gram.mean(axis=0), profile.losses[SINGLE_UNIT_KL].loss)
    column["fisher_raw"] = solve_raw(profile, budget, tables, FISHER, fisher)
    column["logit_raw"] = solve_raw(profile, budget, tables, SINGLE_UNIT_KL, logit)
    column["logit_shrunk"] = find_interacting_assignment(profile, budget, tables, metric=COMBINED)[0]
    return column


def make_free_column(
    profile: SensitivityProfile, tables: dict[str, CostTable], pinned: dict[str, Assignment]
) -> dict[str, Assignment]:
    """Returns the assignments of all units at the bytes that a column with a pinned embedding may use."""
    limit = max(use_of(a.choice, tables)[MEMORY] for a in pinned.values())
    budget = Budget(memory_bytes=limit)
    column = {"uniform": pinned["uniform"]} if "uniform" in pinned else {}
    column |= make_metric_column(profile, tables, budget)
    column["logit_shrunk"] = find_interacting_assignment(profile, budget, tables, metric=COMBINED)[0]
    return column


def solve_raw(
    profile: SensitivityProfile, budget: Budget, tables: dict[str, CostTable], metric: str, sketch: np.ndarray
) -> Assignment:
    """Returns the assignment that takes all cross terms of a sketch at their word."""
    loss = profile.losses[metric].loss
    problem = build_problem(profile, loss, resolve_limits(profile, budget), tables, sketch=sketch)
    result = solve(problem, solver="quadratic")
    assert result.choice is not None
    return Assignment(name=f"{metric} raw", kind="plan", metric=metric, choice=result.choice, result=result)


def introduction(profile: SensitivityProfile) -> list[str]:
    """Returns what all tables of the page have in common."""
    return [
        "# Held-out KL at equal bytes, SmolLM2-135M",
        "",
        f"Made by `python benchmarks/bench_allocation.py`. Machine: {describe_machine()}.",
        "",
        "KL divergence to the reference in nats per token, with half its 95 % interval, on "
        f"{profile.evaluation_tokens.size} tokens of the Python language reference, which nothing else saw. "
        "Calibration and selection text: entries of the Jargon File, no entry in both. Round-to-nearest, asymmetric, "
        "group 64; widths 2, 3, 4, 5, 6, 8 and bf16. A column's bytes are those of the linear layers at that uniform "
        f"width (half widths: midway) and the embedding at {EMBEDDING_FORMAT}.",
        "",
    ]


def render_table(title: str, columns: Columns, evaluated: Scores, selected: Scores, profile: SensitivityProfile) -> str:
    """Returns one table, and below it the plans that selection text would ship, with their ratios."""
    rows = [row for row in ROWS if any(row in column for column in columns.values())]
    lines = [f"## {title}", ""]
    lines += [
        "| metric | " + " | ".join(f"{width:g} bits" for width in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for row in rows:
        lines.append(f"| {ROWS[row]} | " + " | ".join(_cell(evaluated, f"{w:g} {row}") for w in columns) + " |")
    lines += ["", "What selection text would ship, and what it scores on evaluation text:", ""]
    lines += [
        "| width | shipped | KL | × uniform | × weight error | predicted KL | cross terms × |",
        "|---|" + "---|" * 6,
    ]
    loss = profile.losses[COMBINED].loss
    for width, column in columns.items():
        best = min(column, key=lambda row, w=width: float(selected[f"{w:g} {row}"].mean()))  # type: ignore[misc]
        kl = float(evaluated[f"{width:g} {best}"].mean())
        ratios = [_ratio(kl, evaluated.get(f"{width:g} {row}")) for row in ("uniform", WEIGHT_ERROR)]
        predicted = loss[np.arange(len(loss)), column[best].choice].sum()
        factor = column["logit_shrunk"].name.rpartition(" ")[2] if "logit_shrunk" in column else "–"
        lines.append(f"| {width:g} | {ROWS[best]} | {kl:.4f} | {' | '.join(ratios)} | {predicted:.4f} | {factor} |")
    return "\n".join(lines) + "\n"


def _cell(scores: dict[str, np.ndarray], name: str) -> str:
    if name not in scores:
        return "–"
    mean, low, _ = mean_interval(scores[name])
    return f"{mean:.4f} ± {mean - low:.4f}"


def _ratio(kl: float, against: np.ndarray | None) -> str:
    return "–" if against is None else f"{kl / float(against.mean()):.3f}"


if __name__ == "__main__":
    main()
