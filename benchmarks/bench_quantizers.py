"""Output error and time of every quantizer on layers of SmolLM2-135M, and held-out KL. Writes quantizers.md.

``--kl`` adds the KL of uniform models, which renders every linear layer at each width and takes some minutes more.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from torch import Tensor

from allocator.artefacts import Model
from allocator.demo import demo_request
from allocator.demo_model import prepare_demo_model
from allocator.measuring import prepare_text
from allocator.store import Store
from runtime.formats import FORMATS, Format
from runtime.quantization import dequantize
from runtime.quantizers import InputStatistics, find_activation_scale
from runtime.quantizers.automatic import AUTOMATIC, SINGLE_QUANTIZERS
from runtime.quantizers.hqq import find_half_quadratic_grid
from runtime.rendering import render
from runtime.units import list_weights, read_weight
from sensitivity.criteria.output_error import InputSecondMoments, run_under
from sensitivity.evaluation import mean_interval

LAYERS = (
    "0.self_attn.q_proj",
    "0.mlp.down_proj",
    "10.self_attn.v_proj",
    "10.mlp.gate_proj",
    "15.self_attn.o_proj",
    "20.mlp.down_proj",
    "29.mlp.up_proj",
    "29.mlp.down_proj",
)
WIDTHS = (2, 3, 4)
KL_WIDTHS = (3, 4)
KL_QUANTIZERS = ("rtn", "clipping", "gptq", "coordinate_descent")
KL_SEQUENCES = 4
CALIBRATION_SEQUENCES = 16
SCALING = "activation scaling, to be folded"
EMBEDDING_FORMAT = "int8_g64"

Moments = Mapping[str, Tensor]
Results = dict[tuple[str, str, int], "Result"]  # (quantizer, layer, bits)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one quantizer left of one layer.

    Args:
        calibration: Output error on the text that its statistics came from.
        held_out: On other text.
        cpu_s: Time.
    """

    calibration: float
    held_out: float
    cpu_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kl", action="store_true", help="measure the KL of uniform models as well")
    arguments = parser.parse_args()
    store = Store()
    reference = Model(str(prepare_demo_model(store.root))).reference
    text = prepare_text(reference, demo_request(store))
    calibration = text.fisher.tokens[:CALIBRATION_SEQUENCES]
    seen = collect_moments(reference.model, calibration)
    other = collect_moments(reference.model, text.selection.tokens)
    weights = list_weights(reference.model)
    chosen = {name: read_weight(reference.model, weights[f"model.layers.{name}.weight"]) for name in LAYERS}
    results: Results = {}
    for name, weight in chosen.items():
        key = f"model.layers.{name}.weight"
        known = InputStatistics(second_moment=seen[key], count=calibration.numel())
        unknown = InputStatistics(second_moment=other[key], count=text.selection.tokens.numel())
        for bits in WIDTHS:
            results |= measure_layer(name, weight, bits, known, unknown)
    lines = [*introduction(calibration.numel(), text.selection.tokens.numel()), *render_errors(results)]
    lines += render_zero_points(chosen)
    if arguments.kl:
        kl = measure_kl(reference.model, seen, calibration.numel(), text.evaluation.tokens[:KL_SEQUENCES])
        lines += render_kl(kl, text.evaluation.tokens[:KL_SEQUENCES].numel())
    page = "\n".join(lines) + "\n"
    (Path(__file__).parent / "quantizers.md").write_text(page, encoding="utf-8")
    sys.stdout.write(page)


def collect_moments(model: torch.nn.Module, tokens: Tensor) -> Moments:
    """Returns the second moments of the inputs of every linear layer."""
    moments = InputSecondMoments(model)
    run_under(moments, model, tokens)
    return moments.linear


def measure_layer(name: str, weight: Tensor, bits: int, known: InputStatistics, unknown: InputStatistics) -> Results:
    """Returns the results of every quantizer on one layer at one width."""
    format_ = FORMATS[f"int{bits}_g64"]
    makers: dict[str, Callable[[], Tensor]] = {
        quantizer: lambda q=quantizer: dequantize(SINGLE_QUANTIZERS[q](weight, format_, known))  # type: ignore[misc]
        for quantizer in SINGLE_QUANTIZERS
    }
    makers[SCALING] = lambda: find_activation_scale(weight, format_, known).rendered
    results: Results = {}
    for quantizer, make in makers.items():
        started = time.process_time()
        difference = make() - weight
        results[quantizer, name, bits] = Result(
            cpu_s=time.process_time() - started,
            calibration=known.output_error(difference),
            held_out=unknown.output_error(difference),
        )
    return results


def introduction(calibration_tokens: int, held_out_tokens: int) -> list[str]:
    """Returns what all tables have in common."""
    return [
        "# Quantizers, SmolLM2-135M",
        "",
        f"Made by `python benchmarks/bench_quantizers.py --kl` on one thread. Machine: {describe_machine()}.",
        "",
        f"Asymmetric, group 64. Input statistics from {calibration_tokens} tokens of the Jargon File, damping "
        f"{InputStatistics.damping}; held out: {held_out_tokens} tokens of other entries. All "
        "results of a width take the same bytes, but for activation scaling, which needs its scale folded into the "
        "layer before.",
        "",
    ]


def render_errors(results: Results) -> list[str]:
    """Returns the table of output errors, and how often each quantizer is the one that ``auto`` keeps."""
    lines = [
        f"## Output error, as a part of that of round-to-nearest: geometric mean of {len(LAYERS)} layers",
        "",
        "| quantizer | " + " | ".join(f"{b} bits, calibration | {b} bits, held out" for b in WIDTHS) + " | CPU s |",
        "|---|" + "---|" * (2 * len(WIDTHS) + 1),
    ]
    for quantizer in dict.fromkeys(q for q, _, _ in results):
        cells = []
        for bits in WIDTHS:
            pairs = [(results[quantizer, name, bits], results["rtn", name, bits]) for name in LAYERS]
            cells.append(geometric_mean([found.calibration / rtn.calibration for found, rtn in pairs]))
            cells.append(geometric_mean([found.held_out / rtn.held_out for found, rtn in pairs]))
        seconds = np.mean([results[quantizer, name, bits].cpu_s for name in LAYERS for bits in WIDTHS])
        lines.append(f"| {quantizer} | " + " | ".join(f"{c:.3f}" for c in cells) + f" | {seconds:.2f} |")
    kept = [
        min(AUTOMATIC, key=lambda q, name=name, bits=bits: results[q, name, bits].calibration)  # type: ignore[misc]
        for name in LAYERS
        for bits in WIDTHS
    ]
    counts = ", ".join(f"{quantizer} {kept.count(quantizer)}" for quantizer in AUTOMATIC if quantizer in kept)
    lines += ["", f"CPU s: mean of a layer and width. `auto` would keep: {counts} of {len(kept)}.", ""]
    lines += [
        "Held out, layer by layer (coordinate descent):",
        "",
        "| layer | " + " | ".join(f"{bits} bits" for bits in WIDTHS) + " |",
        "|---|" + "---|" * len(WIDTHS),
    ]
    for name in LAYERS:
        ratios = [results["coordinate_descent", name, b].held_out / results["rtn", name, b].held_out for b in WIDTHS]
        lines.append(f"| {name} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")
    return [*lines, ""]


def geometric_mean(ratios: list[float]) -> float:
    """Returns the geometric mean of positive numbers."""
    return float(np.exp(np.mean(np.log(ratios))))


def render_zero_points(weights: Mapping[str, Tensor]) -> list[str]:
    """Returns the table of what it costs half-quadratic grids that zero points are stored as codes."""
    lines = [
        "## Half-quadratic grids with zero points as stored, and left as floats (which no format stores)",
        "",
        "Sum of |error|^0.7, as a part of that of round-to-nearest; geometric mean of the layers.",
        "",
        "| zero points | " + " | ".join(f"{bits} bits" for bits in WIDTHS) + " |",
        "|---|" + "---|" * len(WIDTHS),
    ]
    for label, rounded in (("rounded to codes", True), ("floats", False)):
        cells = []
        for bits in WIDTHS:
            format_ = FORMATS[f"int{bits}_g64"]
            ratios = [
                norm_on_grid(w, format_, round_zero_point=rounded)
                / float((render(w, format_) - w).abs().pow(0.7).sum())
                for w in weights.values()
            ]
            cells.append(f"{geometric_mean(ratios):.3f}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def norm_on_grid(weight: Tensor, format_: Format, *, round_zero_point: bool) -> float:
    """Returns the sum of |error|^0.7 on half-quadratic grids."""
    scale, zero_point = find_half_quadratic_grid(weight, format_, round_zero_point=round_zero_point)
    grouped = weight.view(*scale.shape, -1)
    scale, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    codes = torch.round(grouped / scale + zero_point).clamp(0, (1 << format_.bits) - 1)
    return float((grouped - scale * (codes - zero_point)).abs().pow(0.7).sum())


@torch.no_grad()
def measure_kl(
    model: torch.nn.Module, moments: Moments, count: int, tokens: Tensor
) -> dict[tuple[str, int], np.ndarray]:
    """Returns (quantizer, bits) -> KL of each sequence, every linear layer at one width, the embedding at 8 bits."""
    weights = {name: (read_weight(model, weight), read_weight(model, weight).clone())
               for name, weight in list_weights(model).items()}  # fmt: skip
    reference = log_probabilities(model, tokens)
    results = {}
    for bits in KL_WIDTHS:
        for quantizer in KL_QUANTIZERS:
            for name, (place, values) in weights.items():
                linear = ".layers." in name
                statistics = InputStatistics(second_moment=moments[name], count=count) if linear else None
                format_ = FORMATS[f"int{bits}_g64" if linear else EMBEDDING_FORMAT]
                place.copy_(render(values, format_, quantizer if linear else "rtn", statistics=statistics))
            found = log_probabilities(model, tokens)
            kl = [float((p.exp() * (p - q)).sum(-1).double().mean()) for p, q in zip(reference, found, strict=True)]
            results[quantizer, bits] = np.array(kl)
    for place, values in weights.values():
        place.copy_(values)
    return results


def log_probabilities(model: torch.nn.Module, tokens: Tensor) -> list[Tensor]:
    """Returns the log-probabilities [T, V] of every sequence."""
    return [torch.log_softmax(model(t.unsqueeze(0), use_cache=False).logits[0].float(), dim=-1) for t in tokens]


def render_kl(kl: Mapping[tuple[str, int], np.ndarray], tokens: int) -> list[str]:
    """Returns the table of held-out KL."""
    lines = [
        f"## KL of uniform models on {tokens} tokens of the Python language reference, nats per token",
        "",
        f"Every linear layer at the width, the embedding at {EMBEDDING_FORMAT}; with half the 95 % interval.",
        "",
        "| quantizer | " + " | ".join(f"{bits} bits" for bits in KL_WIDTHS) + " |",
        "|---|" + "---|" * len(KL_WIDTHS),
    ]
    for quantizer in KL_QUANTIZERS:
        cells = []
        for bits in KL_WIDTHS:
            mean, low, _ = mean_interval(kl[quantizer, bits])
            ratio = mean / float(kl["rtn", bits].mean())
            cells.append(f"{mean:.3f} ± {mean - low:.3f} (× {ratio:.2f})")
        lines.append(f"| {quantizer} | " + " | ".join(cells) + " |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
