"""Weights and activations under a limit on bit operations, on two models. Writes activations.md.

Limits are those of uniform widths (8-bit weights and 8-bit activations, 4 and 8, 4 and 4); memory is that of the
weights' width. Beside the plan of one solve stands the uniform format of the same operations with the best of the
activation formats of its width.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_cache import small_mixture, smollm2
from machine import describe_machine
from scipy.stats import spearmanr

from allocator.artefacts import Model
from allocator.assignments import Assignment, use_of
from allocator.budget import BIT_OPERATIONS, MEMORY, Budget
from allocator.measuring import MeasureRequest
from allocator.pipeline import measure
from allocator.planning import default_metric, find_assignment, predicted_kl
from allocator.problems import build_cost_tables
from allocator.progress import shown_progress
from allocator.store import Store
from allocator.verification import score_cached
from sensitivity.activation_losses import join_activations
from sensitivity.evaluation import SequenceScores, mean_interval
from sensitivity.profile import SensitivityProfile

FORMATS = ("int8_token", "int8_tensor", "int8_tensor_static", "fp8_token", "int4_token", "bf16")
UNIFORM = (
    *(("int8_g64", name) for name in ("bf16", "int8_token", "int8_tensor", "int8_tensor_static", "fp8_token")),
    *(("int4_g64", name) for name in ("bf16", "int8_token", "int4_token")),
)
LIMITED = (("int8_g64", "int8_token"), ("int4_g64", "int8_token"), ("int4_g64", "int4_token"))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One plan of the table.

    Args:
        name: Shown.
        plan: The plan.
    """

    name: str
    plan: Assignment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mixture", "smollm2"], choices=["mixture", "smollm2"])
    arguments = parser.parse_args()
    store = Store()
    sections = [introduction(" ".join(sys.argv[1:]))]
    with shown_progress() as progress:
        for name in arguments.models:
            case = small_mixture() if name == "mixture" else smollm2(store)
            request: MeasureRequest = replace(case.request, cache_formats=(), activation_formats=FORMATS)
            model = Model(case.source)
            profile = join_activations(measure(model, request=request, store=store, progress=progress))
            rows = list_rows(profile)
            tokens = profile.evaluation_tokens[: case.evaluated]
            scores = score_cached(
                profile,
                {row.name: row.plan.formats_by_name(profile.candidates) for row in rows},
                tokens,
                load_model=partial(reference_of, model),
                store=store,
                progress=progress,
            )
            sections.append(render(case.title, profile, rows, tokens, scores))
            # The first takes seconds, the second minutes: what is there is shown.
            (Path(__file__).parent / "activations.md").write_text("\n".join(sections), encoding="utf-8")
    sys.stdout.write("\n".join(sections))


def reference_of(model: Model) -> Any:
    """Returns the model that plans are measured on."""
    return model.reference.model


def introduction(flags: str) -> str:
    """Returns what the page is about."""
    lines = [
        "# Activations under a limit on bit operations",
        "",
        f"Made by `python benchmarks/bench_activations.py {flags}`. Machine: {describe_machine()}.",
        "",
        "Bit operations of one token: multiplications × bits of the weights' codes × bits of the activations; heads "
        "and experts read 16-bit activations. Activations: Fisher diagonal of 16 × 128 tokens, static scales of 8 of "
        "these sequences. KL in nats per token on text that nothing else saw, weights and activations quantized "
        "together, with half the 95 % interval. Uniform plans have one format for all weights, the embedding too.",
        "",
    ]
    return "\n".join(lines)


def list_rows(profile: SensitivityProfile) -> list[Row]:
    """Returns the uniform plans, and the plans of one solve at the operations and bytes of some of them."""
    tables = build_cost_tables(profile)
    rows = [Row(name=f"uniform {w}, {a}", plan=make_uniform(profile, w, a)) for w, a in UNIFORM]
    for weights, activations in LIMITED:
        use = use_of(make_uniform(profile, weights, activations).choice, tables)
        budget = Budget(memory_bytes=use[MEMORY], limits={BIT_OPERATIONS: use[BIT_OPERATIONS]})
        plan = find_assignment(profile, budget, tables, metric=default_metric(profile))
        rows.append(Row(name=f"one solve, limits of {weights}, {activations}", plan=plan))
    return rows


def make_uniform(profile: SensitivityProfile, weights: str, activations: str) -> Assignment:
    """Returns one format for all weights and one for all activations."""
    candidates = profile.candidates
    columns = [candidates.format_index(activations if u.kind == "activation" else weights) for u in candidates.units]
    metric = default_metric(profile)
    return Assignment(name="uniform", kind="uniform", metric=metric, choice=np.array(columns, dtype=np.int64))


def render(
    title: str,
    profile: SensitivityProfile,
    rows: list[Row],
    tokens: np.ndarray,
    scores: Mapping[str, SequenceScores],
) -> str:
    """Returns the section of one model."""
    lines = [
        f"## {title}",
        "",
        f"Metric of the weights: {default_metric(profile)}. Measured on {len(tokens)} × {tokens.shape[1]} tokens.",
        "",
        "| plan | MiB | 10⁶ bit operations | predicted KL | measured KL |",
        "|---|---|---|---|---|",
    ]
    tables, pairs = build_cost_tables(profile), []
    for row in rows:
        use, kl = use_of(row.plan.choice, tables), scores[row.name].kl
        mean, low, _ = mean_interval(kl)
        pairs.append((predicted_kl(profile, row.plan)[0], mean))
        lines.append(
            f"| {row.name} | {use[MEMORY] / 2**20:.2f} | {use[BIT_OPERATIONS] / 1e6:.1f} | {pairs[-1][0]:.4f} | "
            f"{mean:.4f} ± {mean - low:.4f} |"
        )
    statistic = spearmanr(*zip(*pairs, strict=True)).statistic
    lines += ["", f"Spearman correlation of predicted and measured KL over the {len(rows)} rows: {statistic:.4f}.", ""]
    lines += [
        "Formats of the plans of one solve, linear layers:",
        "",
        "| plan | activations | weights |",
        "|---|---|---|",
    ]
    for row in rows[len(UNIFORM) :]:
        cells = [
            ", ".join(f"{name} × {count}" for name, count in Counter(formats.values()).most_common())
            for formats in (
                row.plan.formats_by_activation(profile.candidates),
                row.plan.formats_by_weight(profile.candidates),
            )
        ]
        lines.append(f"| {row.name} | {cells[0]} | {cells[1]} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
