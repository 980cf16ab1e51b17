"""Experts that are skipped at run time: visits saved, held-out KL, time a token. Writes expert_pruning.md.

    python benchmarks/bench_expert_pruning.py

The model is the small trained mixture of ``tests/data/small_moe``. Thresholds are found on its calibration text; KL is
measured on other documents, with the unquantized weights and with all weights at 4 bits. Times are of single tokens on
the CPU path, of the whole model and of one layer of the size of real experts, all ways in turns.
"""

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_experts import MODEL, SEQUENCE_TOKENS, read_domains
from bench_mixture import COPIES, EXPERTS, FEED_FORWARD, HIDDEN, build_layers, route_to
from machine import describe_machine
from torch import Tensor
from transformers import DynamicCache

from runtime.apply import apply_formats_
from runtime.expert_skipping import ExpertSkipping, keep_weights, skipped_experts
from runtime.loading import load_reference
from runtime.units import list_weights
from sensitivity.evaluation import mean_interval
from sensitivity.experts.skip_calibration import calibrate_skipping

FORMAT = "int4_g64"
SEQUENCES = 12  # of each domain, to calibrate and to evaluate
QUANTILES = (0.25, 0.5, 0.75, 1.0)
PROTECTED_SHARES = (0.02, 0.1)
TURNS, TURN_TOKENS = 60, 4
LAYER_ROUNDS = 40
# Two experts of 4 bits each in the layer of bench_mixture.
LAYER_EXPERTS = [2, 6]

READING = (
    "",
    "The loss grows faster than the share that is skipped, and thresholds by layer are better than one for all. "
    "Protecting the tokens of the largest norm gives no more than skipping as many fewer experts would. What is saved "
    "is the reading of an expert: time where experts are large, none in the small model, whose experts take less time "
    "than the rule.",
)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way of routing."""

    title: str
    skipping: ExpertSkipping | None


def main() -> None:
    torch.set_num_threads(1)
    reference = load_reference(str(MODEL))
    calibration, evaluation = (read_domains(reference, name, SEQUENCES) for name in ("calibration", "evaluation"))
    ways = list_ways(reference.model, calibration)
    packed = load_reference(str(MODEL)).model
    apply_formats_(packed, dict.fromkeys(list_weights(packed), FORMAT))
    with torch.no_grad():
        before = log_probabilities(reference.model, evaluation)
        seconds = time_tokens(packed, ways, evaluation[:1])
        rows = []
        for way in ways:
            dense_kl, share = measure(reference.model, way, evaluation, before)
            packed_kl, _ = measure(packed, way, evaluation, before)
            ratio = seconds[way.title] / seconds[ways[0].title]
            cells = (f"{share:.1%}", dense_kl, packed_kl, f"{1e3 * seconds[way.title]:.2f}", f"{ratio:.2f}")
            rows.append(f"| {way.title} | {' | '.join(cells)} |")
        text = "\n".join([*describe(ways), *rows, "", *layer_rows(), *READING]) + "\n"
    (Path(__file__).parent / "expert_pruning.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def list_ways(model: Any, calibration: Tensor) -> list[Way]:
    """Returns full routing, thresholds at several quantiles, the median with protected tokens, and other rules."""
    ways = [Way(title="full routing", skipping=None)]
    found = {q: calibrate_skipping(model, calibration, quantile=q, protected_share=0.0) for q in QUANTILES}
    for quantile, skipping in found.items():
        title = f"quantile {quantile}" + {0.5: ", the median", 1.0: ": nearly all second experts"}.get(quantile, "")
        ways.append(Way(title=title, skipping=skipping))
    for share in PROTECTED_SHARES:
        protecting = calibrate_skipping(model, calibration, protected_share=share)
        ways.append(Way(title=f"the median, {share:.0%} of the tokens protected", skipping=protecting))
    median = found[0.5]
    same = (float(np.mean(median.ratio)),) * len(median.ratio)
    return [*ways, Way(title="the median's mean in all layers", skipping=replace(median, ratio=same))]


def measure(model: Any, way: Way, tokens: Tensor, before: Tensor) -> tuple[str, float]:
    """Returns the KL to the reference with full routing, with half its interval, and the share of visits skipped."""
    with nullcontext() if way.skipping is None else skipped_experts(model, way.skipping) as count:
        after = log_probabilities(model, tokens)
    kl = (before.exp() * (before - after)).sum(-1).double().mean(-1)
    mean, low, high = mean_interval(kl.numpy())
    return f"{mean:.4f} ± {(high - low) / 2:.4f}", 0.0 if count is None else count.skipped_share


def log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    """Returns [S, T, V]."""
    parts = [torch.log_softmax(model(part, use_cache=False).logits, dim=-1) for part in torch.split(tokens, 8)]
    return torch.cat(parts)


def time_tokens(model: Any, ways: list[Way], text: Tensor) -> dict[str, float]:
    """Returns the 10th percentile of the seconds of a token behind 32 others, a few tokens of each way in turn."""
    cache = DynamicCache()
    model(text[:, :32], past_key_values=cache)
    measured: dict[str, list[float]] = {way.title: [] for way in ways}
    for _ in range(TURNS):
        for way in ways:
            with nullcontext() if way.skipping is None else skipped_experts(model, way.skipping):
                for position in range(32, 32 + TURN_TOKENS):
                    started = time.perf_counter()
                    model(text[:, position : position + 1], past_key_values=cache)
                    measured[way.title].append(time.perf_counter() - started)
                cache.crop(-TURN_TOKENS)
    return {title: float(np.percentile(seconds, 10)) for title, seconds in measured.items()}


def layer_rows() -> list[str]:
    """Returns the time of a token in a layer of large experts, with and without its second one."""
    layers = build_layers()
    x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(4))
    index, _ = route_to(LAYER_EXPERTS)
    weights = torch.tensor([[0.8, 0.2]])

    def call(layer: Any, ratio: float | None) -> None:
        if ratio is None:
            layer(x, index, weights)
        else:
            layer(x, *keep_weights(x, index, weights, ratio=ratio, magnitude=1e9, absent=EXPERTS))

    titles = {None: "both experts", 0.1: "both, the rule applied", 0.5: "the second skipped by the rule"}
    measured: dict[float | None, list[float]] = {ratio: [] for ratio in titles}
    for turn in range(LAYER_ROUNDS):
        for ratio in titles:
            started = time.perf_counter()
            call(layers[turn % COPIES], ratio)
            measured[ratio].append(time.perf_counter() - started)
    seconds = {ratio: float(np.percentile(times, 10)) for ratio, times in measured.items()}
    lines = [
        f"One token in one layer of {EXPERTS} experts, hidden {HIDDEN}, feed-forward {FEED_FORWARD}, two experts of "
        "4 bits (group 128) a token, weights from memory:",
        "",
        "| a token visits | ms | over both |",
        "|---|---|---|",
    ]
    return lines + [f"| {titles[r]} | {1e3 * s:.3f} | {s / seconds[None]:.2f} |" for r, s in seconds.items()]


def describe(ways: list[Way]) -> list[str]:
    median = ways[1 + QUANTILES.index(0.5)].skipping
    assert median is not None
    return [
        "# Experts skipped at run time",
        "",
        f"Made by `python benchmarks/bench_expert_pruning.py`. Machine: {describe_machine(('torch', 'transformers'))}; "
        "one thread.",
        "",
        "`tests/data/small_moe`: 4 layers of 16 experts, two a token. A token's second expert is skipped where its "
        "weight is below a part of the first's: a quantile of that ratio on calibration text, by layer (the medians: "
        f"{', '.join(f'{ratio:.2f}' for ratio in median.ratio)}). KL in nats per token to the unquantized model with "
        f"full routing, with half its 95 % interval, on {6 * SEQUENCES} held-out sequences of {SEQUENCE_TOKENS} "
        f"tokens. *{FORMAT}*: all weights in this format, whose own error is in the first row; the times are that "
        "model's, a token at a time, module by module.",
        "",
        f"| way | visits skipped | KL, unquantized | KL, {FORMAT} | ms a token | over full routing |",
        "|---|---|---|---|---|---|",
    ]


if __name__ == "__main__":
    main()
