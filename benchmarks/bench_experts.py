"""A mixture of experts at equal bytes: granularities, uniform formats, calibration by self-sampling. Writes experts.md.

The model is the small trained mixture of ``tests/data/small_moe``: six domains of text, 16 experts, two for each token.
One measurement per expert and projection prices all granularities.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from torch import Tensor

from runtime.candidates import Candidates, list_candidates
from runtime.costs import memory_cost
from runtime.loading import ReferenceModel, load_reference
from runtime.units import find_units
from sensitivity.calibration import sample_sequences, tokenize_documents
from sensitivity.evaluation import mean_interval, score_assignments
from sensitivity.experts.expert_tables import shrink_table
from sensitivity.experts.granularity import merge_candidates
from sensitivity.experts.routing_measurement import measure_router_shift, measure_routing
from sensitivity.experts.self_sampling import BalancedSampling, sample_balanced_sequences
from sensitivity.profile import NATS, LossTable
from sensitivity.sketches.fisher_sketch import fisher_loss, measure_fisher_sketch
from solvers import AllocationProblem, solve

MODEL = Path(__file__).parents[1] / "tests" / "data" / "small_moe"
WIDTHS = (3, 4, 5)
FORMATS = tuple(f"int{bits}_g64" for bits in (2, 3, 4, 5, 6, 8))
GRANULARITIES = {
    "projection": "each expert's projection",
    "expert": "each expert",
    "stack_projection": "all experts' projection",
    "stack": "all experts of a layer",
}
SEQUENCE_TOKENS = 128
CALIBRATION_SEQUENCES, EVALUATION_SEQUENCES = 12, 16  # of each domain
SAMPLED_SEQUENCES = 32
SEEDS = (0, 1, 2)


def main() -> None:
    torch.set_num_threads(1)
    reference = load_reference(str(MODEL))
    calibration = read_domains(reference, "calibration", CALIBRATION_SEQUENCES)
    evaluation = read_domains(reference, "evaluation", EVALUATION_SEQUENCES)
    text = "\n".join(
        [*introduction(), *compare_granularities(reference, calibration, evaluation), *compare_text(reference)]
    )
    (Path(__file__).parent / "experts.md").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


def read_domains(reference: ReferenceModel, name: str, sequences: int) -> Tensor:
    """Returns sequences of every domain, as many of each, [S, T]."""
    by_domain: dict[str, list[str]] = {}
    for line in (MODEL / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        by_domain.setdefault(record["domain"], []).append(record["text"])
    parts = [
        tokenize_documents(
            texts, reference.tokenizer, sequences=sequences, sequence_tokens=SEQUENCE_TOKENS, source=domain
        ).tokens
        for domain, texts in by_domain.items()
    ]
    return torch.cat(parts)


def introduction() -> list[str]:
    """Returns what the page is about."""
    return [
        "# A mixture of experts, small and trained",
        "",
        f"Made by `python benchmarks/bench_experts.py`. Machine: {describe_machine()}.",
        "",
        "`tests/data/small_moe`: 4 layers of 16 experts, two a token, 3.5 million parameters, six domains of text. "
        f"Fisher sketch on {6 * CALIBRATION_SEQUENCES} sequences of {SEQUENCE_TOKENS} tokens, losses of rarely taken "
        f"experts shrunk towards their layer's; held-out KL in nats per token on {6 * EVALUATION_SEQUENCES} sequences "
        "of other documents. Round-to-nearest, group 64; the bytes of a column are those of the uniform format.",
        "",
    ]


def plan_granularities(
    reference: ReferenceModel, calibration: Tensor
) -> tuple[dict[str, dict[str, str]], dict[str, float]]:
    """Returns the formats of every plan and what was predicted of it, by width and granularity."""
    candidates = list_candidates(find_units(reference.model), FORMATS, embedding_formats=FORMATS)
    sketch = np.stack(list(measure_fisher_sketch(reference.model, candidates, calibration, seed=0)))
    loss, std_error = fisher_loss(sketch)
    routing = measure_routing(reference.model, calibration)
    table = shrink_table(LossTable(loss=loss, std_error=std_error, unit_of_measure=NATS), routing, candidates)
    formats: dict[str, dict[str, str]] = {}
    predicted: dict[str, float] = {}
    for width in WIDTHS:
        uniform = np.full(len(candidates.units), candidates.format_index(f"int{width}_g64"))
        limit = memory_cost(candidates, 0).cost[np.arange(len(uniform)), uniform].sum()
        formats[f"{width} uniform"] = name_formats(candidates, uniform)
        for granularity in GRANULARITIES:
            merged = merge_candidates(candidates, granularity)
            coarse = merged.sum_table(table.loss)
            result = solve(
                AllocationProblem(
                    loss=coarse,
                    cost=memory_cost(merged.candidates, 0).cost[None],
                    limit=np.array([limit]),
                    allowed=merged.candidates.allowed,
                    resources=("memory_bytes",),
                )
            )
            assert result.choice is not None
            formats[f"{width} {granularity}"] = name_formats(merged.candidates, result.choice)
            predicted[f"{width} {granularity}"] = result.objective
    return formats, predicted


def compare_granularities(reference: ReferenceModel, calibration: Tensor, evaluation: Tensor) -> list[str]:
    """Returns the table of held-out KL by granularity, with paired gains."""
    formats, predicted = plan_granularities(reference, calibration)
    scores = score_assignments(reference.model, formats, evaluation)
    lines = [
        "## One format for each …",
        "",
        "| | " + " | ".join(f"bytes of {w} bits" for w in WIDTHS) + " |",
        "|---|" + "---|" * len(WIDTHS),
    ]
    for row, label in {"uniform": "uniform", **GRANULARITIES}.items():
        cells = []
        for width in WIDTHS:
            name = f"{width} {row}"
            mean, low, _ = mean_interval(scores[name].kl)
            cells.append(f"{mean:.4f} ± {mean - low:.4f}" + (f" ({predicted[name]:.4f})" if name in predicted else ""))
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += [
        "",
        "In brackets: predicted. Paired differences, 95 % intervals:",
        "",
        "| difference | " + " | ".join(f"{w} bits" for w in WIDTHS) + " |",
        "|---|" + "---|" * len(WIDTHS),
    ]
    for worse, better in (
        ("uniform", "projection"),
        ("uniform", "stack"),
        ("stack", "projection"),
        ("stack", "expert"),
        ("stack_projection", "projection"),
    ):
        cells = []
        for width in WIDTHS:
            mean, low, high = mean_interval(scores[f"{width} {worse}"].kl - scores[f"{width} {better}"].kl)
            cells.append(f"{mean:.4f} ({low:.4f} to {high:.4f})")
        lines.append(f"| {label_of(worse)} minus {label_of(better)} | {' | '.join(cells)} |")
    lines += [
        "",
        "Router shift of the plans by expert and projection (share of tokens whose set of experts changes, by layer):",
        "",
    ]
    for width in WIDTHS:
        shift = measure_router_shift(
            reference.model, formats[f"{width} projection"], evaluation[:: EVALUATION_SEQUENCES // 2]
        )
        lines.append(f"- {width} bits: " + ", ".join(f"{share:.3f}" for share in shift.changed))
    return [*lines, ""]


def label_of(row: str) -> str:
    """Returns the name of a row for people."""
    return GRANULARITIES.get(row, row)


def name_formats(candidates: Candidates, choice: np.ndarray) -> dict[str, str]:
    """Returns weight name -> format name of a choice."""
    return {
        weight.name: candidates.formats[int(f)].name
        for unit, f in zip(candidates.units, choice, strict=True)
        for weight in unit.weights
    }


def compare_text(reference: ReferenceModel) -> list[str]:
    """Returns the table of how evenly texts use the experts."""
    model, tokenizer = reference.model, reference.tokenizer
    vocabulary = model.config.vocab_size

    def spread(tokens: Tensor) -> float:
        return float(measure_routing(model, tokens).usage_spread.mean())

    size = {"sequences": SAMPLED_SEQUENCES, "sequence_tokens": SEQUENCE_TOKENS}
    rows: dict[str, list[float]] = {
        "random tokens": [],
        "sampled from the model": [],
        "EBSS as published (temperature 1.2)": [],
        "EBSS, drawn beams, balance carried over sequences, temperature 0.1": [],
    }
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        random = torch.randint(0, vocabulary, (SAMPLED_SEQUENCES, SEQUENCE_TOKENS), generator=generator)
        carried = BalancedSampling(drawn=True, carried=True, temperature=0.1)
        found = (
            random,
            sample_sequences(model, tokenizer, **size, seed=seed).tokens,
            sample_balanced_sequences(model, tokenizer, **size, seed=seed).tokens,
            sample_balanced_sequences(model, tokenizer, **size, seed=seed, sampling=carried).tokens,
        )
        for row, tokens in zip(rows.values(), found, strict=True):
            row.append(spread(tokens))
    lines = [
        "## Text that uses the experts evenly",
        "",
        f"Usage spread (standard deviation of the experts' shares, mean of the layers; MoEQuant) of "
        f"{SAMPLED_SEQUENCES} sequences of {SEQUENCE_TOKENS} tokens, seeds {', '.join(map(str, SEEDS))}:",
        "",
        "| text | mean | by seed |",
        "|---|---|---|",
    ]
    for name, values in rows.items():
        lines.append(f"| {name} | {np.mean(values):.4f} | {', '.join(f'{value:.4f}' for value in values)} |")
    return lines


if __name__ == "__main__":
    main()
