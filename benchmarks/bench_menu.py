"""All formats at the bytes of one: plans made of the whole menu beside the best single format. Writes menu.md.

A small trained mixture (minutes) and SmolLM2-135M (an hour). What is compared takes equal bytes and is rendered by one
quantizer. The menu is narrowed to a shortlist first (``allocator.shortlist``); what that costs is measured on a few
units at every format.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from machine import describe_machine

from allocator.artefacts import Model
from allocator.assignments import Assignment
from allocator.budget import Budget
from allocator.demo import demo_request
from allocator.demo_model import prepare_demo_model
from allocator.measuring import MeasureRequest, find_candidates, prepare_text
from allocator.pipeline import measure
from allocator.planning import find_assignment, predicted_kl
from allocator.problems import build_cost_tables
from allocator.progress import Progress, shown_progress
from allocator.shortlist import MENU, MenuErrors, choose_formats, find_menu_errors, hull_vertices
from allocator.store import Store
from allocator.verification import score_cached
from runtime.candidates import Candidates
from runtime.costs import memory_cost
from runtime.formats import DEFAULT_FORMATS, FORMATS
from runtime.units import list_weights
from sensitivity.evaluation import mean_interval
from sensitivity.measure_config import FISHER, MeasureConfig
from sensitivity.pieces import Piece, read_or_measure
from sensitivity.profile import SensitivityProfile
from sensitivity.sketches.fisher_sketch import measure_streamed_fisher_sketch

# int4_g128 has a float16 scale and a zero point for each 128 weights; rows of 576 hold no whole number of such groups.
INT4_G128_BITS = 4 + (16 + 4) / 128
SINGLES = 6
MIXTURE = Path(__file__).parents[1] / "tests" / "data" / "small_moe"
CHECK_SEQUENCES = 16
CHECKED_BITS = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
WHOLE, INTEGERS = "whole menu", "integers alone"
Scores = Mapping[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a format, or a plan.

    Args:
        name: Shown.
        formats: Weight name -> format name.
        bits: Stored bits per weight.
        predicted: KL, or None where nothing predicts it.
    """

    name: str
    formats: Mapping[str, str]
    bits: float
    predicted: float | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, what is measured of it, and at which bytes plans are compared.

    Args:
        title: Of its section.
        source: The model.
        request: What is measured, but for formats and quantizer.
        limits: Format -> stored bits per weight of all weights in it; None for what they are in this model.
        checked: Units whose every format is measured, to see what the shortlist loses.
    """

    title: str
    source: str
    request: MeasureRequest
    limits: Mapping[str, float | None]
    checked: tuple[str, ...]

    def request_of(self, formats: tuple[str, ...] | None, quantizer: str) -> MeasureRequest:
        """Returns the request for some formats, None for the default ones, rendered by a quantizer."""
        request = replace(self.request, config=replace(self.request.config, quantizer=quantizer))
        return request if formats is None else replace(request, formats=formats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["mixture", "smollm2"], choices=["mixture", "smollm2"])
    parser.add_argument("--quantizer", nargs="+", default=["clipping", "gptq"], help="one table for each")
    arguments = parser.parse_args()
    store = Store()
    makers = {"mixture": small_mixture, "smollm2": smollm2}
    sections = [introduction(" ".join(sys.argv[1:]))]
    with shown_progress() as progress:
        for name in arguments.models:
            case = makers[name](store)
            model = Model(case.source)
            everything = find_candidates(model.reference, case.request_of((MENU,), "clipping"))
            errors = find_menu_errors(
                model.reference,
                everything,
                quantizer="clipping",
                kept=store.root / "shortlists",
                progress=partial(progress, "shortlist"),
            )
            sections += [f"## {case.title}\n", describe_shortlist(everything, errors)]
            sections.append(check_shortlist(case, model, everything, errors, store, progress))
            for quantizer in arguments.quantizer:
                sections.append(run(case, model, everything, errors, quantizer, store, progress))
                # What is there is shown: the next may take long.
                (Path(__file__).parent / "menu.md").write_text("\n".join(sections), encoding="utf-8")
    sys.stdout.write("\n".join(sections))


def small_mixture(_store: Store) -> Case:
    """Returns the small trained mixture of the tests."""
    config = MeasureConfig(
        metrics=(FISHER,),
        fisher_sequences=48,
        fit_plans=None,
        fit_sequences=2,
        selection_sequences=2,
        evaluation_sequences=10,
        evaluation_sequence_tokens=256,
    )
    request = MeasureRequest(
        calibration=str(MIXTURE / "calibration.jsonl"), evaluation=str(MIXTURE / "evaluation.jsonl"), config=config
    )
    return Case(
        title="A small trained mixture of experts (`tests/data/small_moe`, 3.5 million parameters)",
        source=str(MIXTURE),
        request=request,
        limits={"int4_g128": None, "int3_g64": None},
        checked=("model.layers.1.self_attn.q_proj", "model.layers.2.mlp.experts.gate_up_proj[3]"),
    )


def smollm2(store: Store) -> Case:
    """Returns the demonstration's model and texts, with a third of the sequences."""
    request = demo_request(store)
    config = replace(request.config, metrics=(FISHER,), fisher_sequences=32, fit_plans=None, fit_sequences=2)
    return Case(
        title="SmolLM2-135M",
        source=str(prepare_demo_model(store.root)),
        request=replace(request, config=config),
        limits={"int4_g128": INT4_G128_BITS, "int4_g64": None},
        checked=("model.layers.15.self_attn.q_proj", "model.layers.15.mlp.down_proj"),
    )


def run(
    case: Case,
    model: Model,
    everything: Candidates,
    errors: MenuErrors,
    quantizer: str,
    store: Store,
    progress: Progress,
) -> str:
    """Returns the section of one quantizer."""
    menu = measure(model, request=case.request_of((MENU,), quantizer), store=store, progress=progress)
    integers = measure(model, request=case.request_of(None, quantizer), store=store, progress=progress)
    limits = {name: bits or bits_of(model, name) for name, bits in case.limits.items()}
    rows: dict[str, list[Row]] = {}
    plans: dict[str, Assignment] = {}
    for name, limit in limits.items():
        plans[name] = find_plan(menu, limit)
        planned = [(WHOLE, menu, plans[name]), (INTEGERS, integers, find_plan(integers, limit))]
        rows[name] = list_singles(model, everything, errors, limit)
        rows[name] += [make_row(title, profile, plan) for title, profile, plan in planned]
    named = {row.name if row.predicted is None else f"{name} {row.name}": row for name in rows for row in rows[name]}
    scores = {
        name: score.kl
        for name, score in score_cached(
            menu,
            {name: row.formats for name, row in named.items()},
            menu.evaluation_tokens,
            load_model=lambda: model.reference.model,
            store=store,
            progress=progress,
        ).items()
    }
    lines = [f"### Rendered by {quantizer}", "", f"Shortlist: {menu.provenance['menu']}."]
    for name, limit in limits.items():
        lines += ["", f"#### At the bytes of {name}, {limit:.3f} stored bits per weight", ""]
        lines += render_rows(name, rows[name], scores)
        lines += ["", *render_choice(menu.candidates, plans[name])]
    return "\n".join([*lines, ""])


def bits_of(model: Model, format_name: str) -> float:
    """Returns the stored bits per weight of all weights in one format."""
    weights = list_weights(model.reference.model).values()
    total = sum(FORMATS[format_name].storage_bytes(weight.shape) for weight in weights)
    return 8 * total / sum(weight.weight_count for weight in weights)


def find_plan(profile: SensitivityProfile, limit: float) -> Assignment:
    """Returns the plan of a profile that stores so many bits per weight."""
    return find_assignment(profile, Budget(bits_per_weight=limit), build_cost_tables(profile), metric=FISHER)


def make_row(title: str, profile: SensitivityProfile, plan: Assignment) -> Row:
    """Returns a plan's line."""
    candidates = profile.candidates
    formats = plan.formats_by_weight(candidates)
    weights = [weight for unit in candidates.units for weight in unit.weights]
    stored = sum(FORMATS[formats[weight.name]].storage_bytes(weight.shape) for weight in weights)
    bits = 8 * stored / sum(weight.weight_count for weight in weights)
    return Row(name=title, formats=formats, bits=bits, predicted=predicted_kl(profile, plan)[0])


def list_singles(model: Model, everything: Candidates, errors: MenuErrors, limit: float) -> list[Row]:
    """Returns the formats that all weights fit at no more bits, the ``SINGLES`` of least mean error on the sample."""
    weights = list_weights(model.reference.model)
    # Under 4 bits the sample leaves the embedding out: such a format is a single one all the same.
    mean = np.where(np.isfinite(errors.error), errors.error, np.nan)
    found = [
        (float(np.nanmean(mean[:, f])), format_.name, bits_of(model, format_.name))
        for f, format_ in enumerate(everything.formats)
        if all(format_.fits(weight.shape[1]) for weight in weights.values())
    ]
    best = sorted(row for row in found if row[2] <= limit)[:SINGLES]
    return [Row(name=name, formats=dict.fromkeys(weights, name), bits=bits) for _, name, bits in best]


def introduction(flags: str) -> str:
    """Returns what the page is about."""
    lines = [
        "# The whole menu at the bytes of one format",
        "",
        f"Made by `python benchmarks/bench_menu.py {flags}`. Machine: {describe_machine()}.",
        "",
        "KL to the reference in nats per token, with half its 95 % interval, on 10 × 256 tokens that nothing else saw. "
        f"Plans: Fisher diagonal, all weights allocated, embeddings too; *{INTEGERS}*: of {', '.join(DEFAULT_FORMATS)} "
        f"alone. Single formats: of those that fit all rows at no more bytes, the {SINGLES} of least error on the "
        "sampled weights. SmolLM2's rows of 576 hold no whole number of groups of 128: `int4_g128` itself is not among "
        "its single formats, and its bytes are those that it would take.",
        "",
    ]
    return "\n".join(lines)


def describe_shortlist(everything: Candidates, errors: MenuErrors) -> str:
    """Returns which formats the shortlist holds, at several tolerances."""
    lines = [
        "### The shortlist",
        "",
        f"{len(everything.formats)} formats on a few rows of {len(errors.units)} weights, integers by `clipping`: the "
        "formats that are left, and the factor by which their hulls of squared error over bits exceed those of all "
        "formats at most.",
        "",
        "| tolerance | formats | factor | which |",
        "|---|---|---|---|",
    ]
    for tolerance in (0.0, 0.02, 0.05, 0.1, 0.2):
        chosen, bound = choose_formats(errors, tolerance=tolerance)
        names = ", ".join(everything.formats[f].name for f in chosen)
        lines.append(f"| {tolerance:.0%} | {len(chosen)} | {bound:.4f} | {names} |")
    return "\n".join([*lines, ""])


def check_shortlist(
    case: Case, model: Model, everything: Candidates, errors: MenuErrors, store: Store, progress: Progress
) -> str:
    """Returns how far the hulls of estimated losses, not of errors, exceed those of all formats on a few units."""
    rows = [u for u, unit in enumerate(everything.units) if unit.name in case.checked]
    few = Candidates(
        units=tuple(everything.units[u] for u in rows),
        formats=everything.formats,
        allowed=everything.allowed[rows],
        reasons={},
    )
    tokens = prepare_text(model.reference, case.request_of((MENU,), "clipping")).fisher.tokens[:CHECK_SEQUENCES]
    place = store.root / "bench_menu" / model.fingerprint

    def sketch() -> Piece:
        found = measure_streamed_fisher_sketch(
            model.reference.model,
            few,
            tokens,
            seed=0,
            directory=place / "stream",
            progress=partial(progress, "check"),
            quantizer="clipping",
        )
        return {"sketch": found}

    squares = 0.5 * read_or_measure(place / "check.safetensors", sketch)["sketch"].astype(np.float64) ** 2
    halves = [squares[part::2].mean(axis=0) for part in (0, 1)]
    bits = 8 * memory_cost(few, 0).cost / np.array([[unit.weight_count] for unit in few.units])
    lines = [
        f"Fisher losses of all formats on {len(rows)} units, {CHECK_SEQUENCES} × 128 tokens. At so many bits of the "
        "unit the best mixture of formats by one half of the sequences, judged by the other: that of the shortlist "
        "over that of all formats. Above one the shortlist loses; what is below one, or far above, is the noise of a "
        "choice among 300.",
        "",
        "| unit | " + " | ".join(f"{b:g} bits" for b in CHECKED_BITS) + " |",
        "|---" * (1 + len(CHECKED_BITS)) + "|",
    ]
    chosen, _ = choose_formats(errors)
    for u, unit in enumerate(few.units):
        kept = np.array([f for f in chosen if few.allowed[u, f]])
        judged = [
            sum(judge(bits[u, own], a[u, own], b[u, own]) for a, b in (halves, halves[::-1]))
            for own in (kept, np.flatnonzero(few.allowed[u]))
        ]
        lines.append(f"| {unit.name} | " + " | ".join(f"{x:.3f}" for x in judged[0] / judged[1]) + " |")
    return "\n".join([*lines, ""])


def judge(bits: np.ndarray, chosen_by: np.ndarray, judged_by: np.ndarray) -> np.ndarray:
    """Returns the losses [B] at ``CHECKED_BITS`` of the mixtures on the hull of one table, by another table."""
    vertices = hull_vertices(bits, chosen_by)
    return np.interp(CHECKED_BITS, bits[vertices], judged_by[vertices])


def render_rows(name: str, rows: list[Row], scores: Scores) -> list[str]:
    """Returns the table of one budget, and the paired difference of the plan to the best single format."""
    keys = [row.name if row.predicted is None else f"{name} {row.name}" for row in rows]
    lines = ["| | stored bits | predicted KL | held-out KL |", "|---|---|---|---|"]
    for key, row in zip(keys, rows, strict=True):
        mean, low, _ = mean_interval(scores[key])
        predicted = "" if row.predicted is None else f"{row.predicted:.4f}"
        lines.append(f"| {row.name} | {row.bits:.3f} | {predicted} | {mean:.4f} ± {mean - low:.4f} |")
    singles = [key for key, row in zip(keys, rows, strict=True) if row.predicted is None]
    best = min(singles, key=lambda key: float(scores[key].mean()))
    whole = scores[f"{name} {WHOLE}"]
    pairs = ((best, scores[best]), (INTEGERS, scores[f"{name} {INTEGERS}"]))
    for other, kl in pairs:
        mean, low, high = mean_interval(whole - kl)
        lines += ["", f"*{WHOLE}* less *{other}*, paired: {mean:+.4f} ({low:+.4f} to {high:+.4f}); "]
        lines[-1] += f"ratio of means {float(whole.mean() / kl.mean()):.3f}."
    return lines


def render_choice(candidates: Candidates, plan: Assignment) -> list[str]:
    """Returns which formats a plan takes for which role, and in which third of the layers."""
    layers = max(unit.layer_index for unit in candidates.units if unit.layer_index is not None) + 1
    roles = list(dict.fromkeys(unit.role for unit in candidates.units))
    thirds = ("first third", "middle", "last third")
    counts: dict[str, Counter[str]] = {}
    for unit, f in zip(candidates.units, plan.choice, strict=True):
        own = counts.setdefault(candidates.formats[int(f)].name, Counter())
        own[unit.role] += 1
        own["all"] += 1
        if unit.layer_index is not None:
            own[thirds[3 * unit.layer_index // layers]] += 1
    columns = ["all", *roles, *thirds]
    lines = [f"Units of the *{WHOLE}* by format, role, and third of the layers:", ""]
    lines += ["| format | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    order = sorted(counts, key=lambda name: -counts[name]["all"])
    return lines + [f"| {name} | " + " | ".join(str(counts[name][c] or "") for c in columns) + " |" for name in order]


if __name__ == "__main__":
    main()
