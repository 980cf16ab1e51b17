"""Time and memory of ``measure``: linear in sequences, not in units x formats. Writes measure.md."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from machine import describe_machine

from allocator.demo_model import prepare_demo_model
from allocator.store import Store

CASES = (
    ("sequences", {"sequences": 4, "formats": 7, "layers": 30}),
    ("sequences", {"sequences": 8, "formats": 7, "layers": 30}),
    ("sequences", {"sequences": 16, "formats": 7, "layers": 30}),
    ("formats", {"sequences": 8, "formats": 14, "layers": 30}),
    ("units", {"sequences": 8, "formats": 7, "layers": 15}),
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
    rows = [(kind, case, run_apart(case)) for kind, case in CASES]
    full = run_apart({"measure": True})
    text = render(rows, full)
    (Path(__file__).parent / "measure.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def run_apart(case: dict[str, object]) -> dict[str, float]:
    """Returns the figures of a case run in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    figures: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return figures


def run_case(case: dict[str, object]) -> dict[str, float]:
    """Returns seconds of the case, peak resident bytes and the model's own float32 bytes."""
    import resource

    import torch

    from runtime.candidates import list_candidates
    from runtime.loading import load_reference
    from runtime.units import find_units
    from sensitivity.fisher_sketch import measure_fisher_sketch

    path = str(prepare_demo_model(Store().root))
    if case.get("measure"):
        started = time.perf_counter()
        parameters = measure_whole(path)
    else:
        reference = load_reference(path)
        parameters = sum(p.numel() for p in reference.model.parameters())
        formats = SEVEN if case["formats"] == 7 else MENU
        units = [u for u in find_units(reference.model) if (u.layer_index or 0) < int(str(case["layers"]))]
        candidates = list_candidates(units, formats)
        tokens = torch.randint(
            0, 40_000, (int(str(case["sequences"])), 128), generator=torch.Generator().manual_seed(0)
        )
        next(iter(measure_fisher_sketch(reference.model, candidates, tokens[:1], seed=0)))
        started = time.perf_counter()
        for _ in measure_fisher_sketch(reference.model, candidates, tokens, seed=0):
            pass
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_bytes": peak, "model_bytes": 4 * parameters}


def measure_whole(path: str) -> int:
    """Measures everything once with few sequences, in a store of its own, and returns the model's parameters."""
    import tempfile

    from allocator.artefacts import Model
    from allocator.demo import demo_request
    from allocator.pipeline import measure
    from sensitivity.measure import MeasureConfig

    model = Model(path)
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch))
        request = demo_request(store)
        few = MeasureConfig(fisher_sequences=4)
        measure(model, request=type(request)(**{**vars(request), "config": few}), store=store)
    return sum(p.numel() for p in model.reference.model.parameters())


def render(rows: list[tuple[str, dict[str, int], dict[str, float]]], full: dict[str, float]) -> str:
    """Returns the page: each case as a ratio to its base, and the peak against the bound."""
    base = next(figures for _, case, figures in rows if case == {"sequences": 8, "formats": 7, "layers": 30})
    bound = 3 * full["model_bytes"] + 2**30
    lines = [
        "# What a measurement costs, SmolLM2-135M",
        "",
        f"Made by `python benchmarks/bench_measure.py`. Machine: {describe_machine()}.",
        "",
        "Fisher sketch, sequences of 128 tokens; each case in a process of its own; ratios to the base of "
        "8 sequences, 7 formats, 30 layers (211 units).",
        "",
        "| varied | sequences | formats | layers | s | × base | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, case, figures in rows:
        lines.append(
            f"| {kind} | {case['sequences']} | {case['formats']} | {case['layers']} | {figures['seconds']:.1f} | "
            f"{figures['seconds'] / base['seconds']:.2f} | {figures['peak_bytes'] / 2**30:.2f} |"
        )
    lines += [
        "",
        f"A whole `measure` (all metrics, logit sketch of all units): peak {full['peak_bytes'] / 2**30:.2f} GiB; bound "
        f"3 × the model's float32 bytes + 1 GiB = {bound / 2**30:.2f} GiB; {full['seconds']:.0f} s.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
