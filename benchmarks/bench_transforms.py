"""KL of uniform models of SmolLM2-135M with and without each transform. Writes transforms.md.

Each transform's numbers are kept in the store as soon as they are measured; a run that is interrupted goes on.
"""

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from bench_quantizers import log_probabilities
from machine import describe_machine
from torch import Tensor

from allocator.artefacts import Model
from allocator.demo import demo_request
from allocator.demo_model import prepare_demo_model
from allocator.measuring import prepare_text
from allocator.store import Store
from runtime.apply import simulated_formats
from runtime.formats import FORMATS
from runtime.rendering import render as render_weight
from runtime.transforms import apply_transforms_, parse_transform
from runtime.transforms.observation import observe_second_moments
from runtime.units import list_weights
from sensitivity.evaluation import mean_interval
from sensitivity.pieces import read_or_measure
from sensitivity.profile import fingerprint_of

CASES = (
    "",
    "smoothquant:alpha=0.25",
    "smoothquant:alpha=0.5",
    "outliertune",
    "mergequant",
    "equalize",
    "equalize:inputs=0.5",
    "hadamard",
    "awq",
    "head_hadamard",
    "hadamard,head_hadamard",
    "pca",
)
WIDTHS = (4, 3)
LAYERS = tuple(f"{i}.{part}" for i in (2, 10, 20, 28) for part in ("self_attn.q_proj", "mlp.up_proj"))
OUTSIDE_FORMAT = "int8_g64"
SEQUENCES = 4
CALIBRATION_SEQUENCES = 16


def main() -> None:
    store = Store()
    model = Model(str(prepare_demo_model(store.root)))
    text = prepare_text(model.reference, demo_request(store))
    calibration, tokens = text.fisher.tokens[:CALIBRATION_SEQUENCES], text.evaluation.tokens[:SEQUENCES]
    find_before = cache(lambda: log_probabilities(model.reference.model, tokens))
    results = {}
    for case in CASES:
        key = fingerprint_of({"case": case, "tokens": tokens.tolist(), "calibration": calibration.tolist()})
        path = store.root / "benchmarks" / f"transforms-{key}.safetensors"
        results[case] = read_or_measure(path, lambda c=case: measure(model, c, calibration, tokens, find_before()))  # type: ignore[misc]
        sys.stderr.write(f"{case or 'none'}: { ({n: float(a.mean()) for n, a in results[case].items()}) }\n")
    errors = {
        case: read_or_measure(
            store.root / "benchmarks" / f"layer-errors-{case or 'none'}.safetensors",
            lambda c=case: measure_layer_errors(model, c, calibration[:2]),  # type: ignore[misc]
        )
        for case in ("", "hadamard")
    }
    lines = [*render(results, calibration.numel(), tokens.numel()), *render_errors(errors)]
    page = "\n".join(lines) + "\n"
    (Path(__file__).parent / "transforms.md").write_text(page, encoding="utf-8")
    sys.stdout.write(page)


@torch.no_grad()
def measure(
    model: Model, case: str, calibration: Tensor, tokens: Tensor, before: list[Tensor]
) -> dict[str, np.ndarray]:
    """Returns the KL [S] to the model before, of the transformed reference and at each width, and bytes of weights."""
    reference = model.load_again().model
    transforms = [parse_transform(name) for name in case.split(",") if name]
    apply_transforms_(reference, transforms, calibration)
    found = {"reference": measure_kl(before, log_probabilities(reference, tokens))}
    for bits in WIDTHS:
        formats = {name: f"int{bits}_g64" if ".layers." in name else OUTSIDE_FORMAT for name in list_weights(reference)}
        with simulated_formats(reference, formats):
            found[f"{bits} bits"] = measure_kl(before, log_probabilities(reference, tokens))
        stored = (FORMATS[formats[name]].storage_bytes(w.shape) for name, w in list_weights(reference).items())
        found[f"{bits} bits, bytes"] = np.array([float(sum(stored))])
    return found


def measure_kl(before: list[Tensor], after: list[Tensor]) -> np.ndarray:
    """Returns the KL in nats per token of every sequence."""
    return np.array([float((p.exp() * (p - q)).sum(-1).double().mean()) for p, q in zip(before, after, strict=True)])


@torch.no_grad()
def measure_layer_errors(model: Model, case: str, tokens: Tensor) -> dict[str, np.ndarray]:
    """Returns layer -> relative weight error, relative output error, and the share of the inputs' first direction."""
    reference = model.load_again().model
    apply_transforms_(reference, [parse_transform(name) for name in case.split(",") if name], tokens)
    modules = {name: reference.get_submodule(f"model.layers.{name}") for name in LAYERS}
    moments, _ = observe_second_moments(reference, tokens, modules)
    found = {}
    for name, module in modules.items():
        weight, moment = module.weight.double(), moments[name]
        difference = render_weight(module.weight, FORMATS["int3_g64"]).double() - weight
        powers = torch.linalg.eigvalsh(moment)
        found[name] = np.array(
            [
                float(difference.square().sum() / weight.square().sum()),
                float(((difference @ moment) * difference).sum() / ((weight @ moment) * weight).sum()),
                float(powers[-1] / powers.sum()),
            ]
        )
    return found


def render_errors(errors: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """Returns the table that explains what a rotation does to weights alone."""
    lines = [
        "",
        "## What a rotation does to one layer, 3 bits",
        "",
        "Squared errors as parts of the weight's and the output's own size; first direction: the share of the inputs' "
        "power in their first principal axis. A rotation makes weights rounder, so that they lose less. But norm "
        "weights go into the readers first: where a norm had held down the direction of most power, as before up_proj, "
        "that comes at full size and meets rounding errors that are equal in all directions.",
        "",
        "| layer | " + " | ".join(f"{case or 'none'}: weight | output | first direction" for case in errors) + " |",
        "|---|" + "---|" * (3 * len(errors)),
    ]
    for name in LAYERS:
        cells = [f"{value:.3f}" for case in errors for value in errors[case][name]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def render(results: Mapping[str, Mapping[str, np.ndarray]], calibration_tokens: int, tokens: int) -> list[str]:
    """Returns the page."""
    lines = [
        "# Transforms, SmolLM2-135M",
        "",
        f"Made by `python benchmarks/bench_transforms.py` on one thread. Machine: {describe_machine()}.",
        "",
        f"KL to the model before the transform, nats per token, on {tokens} tokens of the Python language reference, "
        f"with half the 95 % interval over {SEQUENCES} sequences; in brackets the part of the KL without transform, "
        "from the same tokens. Linear layers of the blocks round to nearest at the width, group 64; embedding, head "
        f"and the matrix before a tied head at {OUTSIDE_FORMAT}. Calibration: {calibration_tokens} tokens of the "
        "Jargon File; `equalize` reads no text. "
        "Reference: KL of the transformed model before it is quantized, which is rounding of float32. The model is "
        "tied; it is a random rescaling of trained weights (sigma 0.15), and transforms that scale may undo a part of "
        "that. Activations are not quantized, which is what smoothing and rotations are mostly for.",
        "",
        "| transform | " + " | ".join(f"{bits} bits | MiB of weights" for bits in WIDTHS) + " | reference |",
        "|---|" + "---|" * (2 * len(WIDTHS) + 1),
    ]
    for case, found in results.items():
        cells = []
        for bits in WIDTHS:
            name = f"{bits} bits"
            mean, low, _ = mean_interval(found[name])
            share = mean / float(results[""][name].mean())
            cells.append(f"{mean:.3f} ± {mean - low:.3f} (× {share:.2f})")
            cells.append(f"{float(found[f'{name}, bytes'][0]) / 2**20:.2f}")
        cells.append(f"{float(found['reference'].mean()):.1e}")
        lines.append(f"| {case or 'none'} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
