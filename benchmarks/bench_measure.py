"""Time and memory of ``measure``, varied in sequences, formats and units. Writes measure.md."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import describe_machine

from allocator.demo_model import prepare_demo_model
from allocator.store import Store

BASE = {"path": "streamed", "sequences": 16, "tokens": 128, "formats": 7, "layers": 30}
# The same with some of it varied. "whole": a backward pass of the whole model for each sequence; "streamed": layer by
# layer; "stored": layer by layer, with the weights read from disk when they are used.
VARIED: tuple[dict[str, int | str], ...] = (
    {},
    {"sequences": 8},
    {"sequences": 32},
    {"formats": 14},
    {"layers": 15},
    {"tokens": 32},
    {"tokens": 32, "formats": 14},
    {"path": "stored"},
    {"path": "whole"},
    {"path": "whole", "formats": 14},
    {"path": "whole", "layers": 15},
    {"path": "whole", "tokens": 32},
)
MENU = [f"int{bits}_g{group}" for group in (64, 32) for bits in (2, 3, 4, 5, 6, 8)] + ["bf16", "fp16"]
SEVEN = [*MENU[:6], "bf16"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help="one case as JSON, run in this process")
    case = parser.parse_args().case
    if case is not None:
        print(json.dumps(run_case(json.loads(case))))
        return
    rows = [({**BASE, **varied}, run_apart({**BASE, **varied})) for varied in VARIED]
    full = run_apart({"measure": True})
    text = render(rows, full)
    (Path(__file__).parent / "measure.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def run_apart(case: dict[str, Any]) -> dict[str, float]:
    """Returns the figures of a case run in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    figures: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return figures


def run_case(case: dict[str, Any]) -> dict[str, float]:
    """Returns wall and processor seconds of the case, peak resident bytes and the model's own float32 bytes."""
    import resource

    path = prepare_demo_model(Store().root)
    started = time.perf_counter(), time.process_time()
    if case.get("measure"):
        parameters = measure_whole(str(path))
    else:
        parameters, started = measure_fisher(path, case)
    return {
        "seconds": time.perf_counter() - started[0],
        "cpu_seconds": time.process_time() - started[1],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "model_bytes": 4 * parameters,
    }


def measure_fisher(path: Path, case: dict[str, Any]) -> tuple[int, tuple[float, float]]:
    """Measures a Fisher sketch; returns the model's parameters and the wall and processor time when it began."""
    import tempfile

    import torch

    from runtime.candidates import list_candidates
    from runtime.loading import load_reference
    from runtime.stored_weights import StoredWeights, build_empty_model
    from runtime.units import find_units
    from sensitivity.sketches.fisher_sketch import measure_fisher_sketch, measure_streamed_fisher_sketch

    stored = case["path"] == "stored"
    model = build_empty_model(path) if stored else load_reference(str(path)).model
    units = [u for u in find_units(model) if (u.layer_index or 0) < case["layers"]]
    candidates = list_candidates(units, SEVEN if case["formats"] == 7 else MENU)
    shape = (case["sequences"], case["tokens"])
    tokens = torch.randint(0, 40_000, shape, generator=torch.Generator().manual_seed(0))
    if not stored:
        model(tokens[:1])
    started = time.perf_counter(), time.process_time()
    if case["path"] == "whole":
        for _ in measure_fisher_sketch(model, candidates, tokens, seed=0):
            pass
    else:
        with tempfile.TemporaryDirectory() as scratch:
            measure_streamed_fisher_sketch(
                model,
                candidates,
                tokens,
                seed=0,
                directory=Path(scratch),
                progress=lambda *_: None,
                residency=StoredWeights(model, path) if stored else None,
            )
    return sum(p.numel() for p in model.parameters()), started


def measure_whole(path: str) -> int:
    """Measures everything once with few sequences, in a store of its own, and returns the model's parameters."""
    import tempfile

    from allocator.artefacts import Model
    from allocator.demo import demo_request
    from allocator.pipeline import measure
    from sensitivity.measure_config import MeasureConfig

    model = Model(path)
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch))
        request = demo_request(store)
        few = MeasureConfig(fisher_sequences=4)
        measure(model, request=type(request)(**{**vars(request), "config": few}), store=store)
    return sum(p.numel() for p in model.reference.model.parameters())


def render(rows: list[tuple[dict[str, Any], dict[str, float]]], full: dict[str, float]) -> str:
    """Returns the page: each case as a ratio to its base, and the peak against the bound."""
    bound = 3 * full["model_bytes"] + 2**30
    lines = [
        "# What a measurement costs, SmolLM2-135M",
        "",
        f"Made by `python benchmarks/bench_measure.py`. Machine: {describe_machine()}.",
        "",
        "Fisher sketch; each case in a process of its own. Whole: a backward pass of the whole model per sequence. "
        "Streamed: layer by layer, every candidate rendered once. Stored: streamed, with weights read from disk when "
        "they are used. Ratios of processor time to the same path and length with 16 sequences, 7 formats, 30 layers "
        "(211 units).",
        "",
        "| path | sequences | tokens each | formats | layers | s | processor s | × base | peak GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, figures in rows:
        base_case = {**BASE, "path": case["path"], "tokens": case["tokens"]}
        base = next(f for c, f in rows if c == base_case)
        lines.append(
            f"| {case['path']} | {case['sequences']} | {case['tokens']} | {case['formats']} | {case['layers']} | "
            f"{figures['seconds']:.1f} | {figures['cpu_seconds']:.1f} | "
            f"{figures['cpu_seconds'] / base['cpu_seconds']:.2f} | {figures['peak_bytes'] / 2**30:.2f} |"
        )
    lines += [
        "",
        f"A whole `measure` (all metrics, logit sketch of all units): peak {full['peak_bytes'] / 2**30:.2f} GiB; bound "
        f"3 × the model's float32 bytes + 1 GiB = {bound / 2**30:.2f} GiB; {full['seconds']:.0f} s.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
