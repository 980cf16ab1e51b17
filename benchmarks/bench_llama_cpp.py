"""Plans against files of the same size, all run by llama.cpp itself, on SmolLM2-135M. Writes llama_cpp.md.

    python benchmarks/bench_llama_cpp.py [--llama-quantize PATH] [--profile DIRECTORY]

With llama-quantize, of any build of llama.cpp, the rivals are its own mixes of the unquantized model that bitplan
exports; without it, one type for all weights where rows allow it. Each rival's file size is the budget of a plan, so
that a plan is never a byte larger. KL is llama.cpp's own logits against its logits of the unquantized file: one engine,
one arithmetic for all.
"""

import argparse
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine

import allocator
from allocator.assignments import list_uniform
from allocator.demo import demo_request
from allocator.demo_model import prepare_demo_model
from allocator.engine_rules import restrict_profile
from allocator.progress import shown_progress
from allocator.store import Store
from runtime.engines import find_engine
from runtime.exporters import export
from runtime.loading import ReferenceModel
from runtime.units import list_weights
from sensitivity.evaluation import mean_interval
from sensitivity.profile import SensitivityProfile

sys.path.append(str(Path(__file__).parents[1]))
from tests.llama_cpp_client import loaded  # noqa: E402 (the directory above is not on the path of a script)

ENGINE = find_engine("llama.cpp")
MIXES = ("Q3_K_S", "Q4_0", "Q3_K_M", "Q4_K_M", "Q5_K_M")
UNIFORM = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "int4_g32_sym", "int5_g32_sym")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--llama-quantize", help="llama.cpp's quantizer; its own mixes are then the rivals")
    parser.add_argument("--profile", type=Path, help="profile to use; measured now otherwise")
    options = parser.parse_args()
    store = Store()
    model = allocator.Model(str(prepare_demo_model(store.root)))
    with shown_progress() as progress, tempfile.TemporaryDirectory() as scratch:
        if options.profile is not None:
            profile = allocator.load_profile(options.profile)
        else:
            request = replace(demo_request(), formats=ENGINE.menu, embedding_formats=ENGINE.menu)
            profile = allocator.measure(model, request=request, store=store, progress=progress)
        directory = Path(scratch)
        reference = write(model.reference, dict.fromkeys(list_weights(model.reference.model), "fp16"), directory, "F16")
        rivals = (
            make_mixes(options.llama_quantize, reference)
            if options.llama_quantize
            else make_uniform(model.reference, profile, directory)
        )
        rows = compare(model, profile, reference, rivals)
    text = render(rows, profile)
    (Path(__file__).parent / "llama_cpp.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def write(reference: ReferenceModel, formats: dict[str, str], directory: Path, name: str) -> Path:
    """Returns the GGUF file of a model in some formats."""
    export(reference, formats, directory / name, exporter="llama.cpp")
    return directory / name / "model.gguf"


def make_mixes(program: str, reference: Path) -> dict[str, Path]:
    """Returns llama.cpp's own mixes, made by its quantizer without an importance matrix."""
    paths = {mix: reference.parent / f"{mix}.gguf" for mix in MIXES}
    for mix, path in paths.items():
        subprocess.run([program, str(reference), str(path), mix, "1"], check=True, capture_output=True)
    return paths


def make_uniform(reference: ReferenceModel, profile: SensitivityProfile, directory: Path) -> dict[str, Path]:
    """Returns a file for each type that all weights can take."""
    restricted = restrict_profile(profile, ENGINE)
    uniform = {a.name: a.formats_by_weight(restricted.candidates) for a in list_uniform(restricted.candidates, "")}
    named = {name: uniform[f"uniform {name}"] for name in UNIFORM if f"uniform {name}" in uniform}
    return {name: write(reference, formats, directory, name) for name, formats in named.items()}


def compare(
    model: allocator.Model, profile: SensitivityProfile, reference: Path, rivals: dict[str, Path]
) -> list[tuple[str, int, np.ndarray, int, np.ndarray, float]]:
    """Returns rival, its bytes and KL by sequence, the plan's bytes and KL by sequence, and the plan's predicted KL."""
    rows = []
    for name, path in rivals.items():
        size = path.stat().st_size
        budget = allocator.Budget(memory_bytes=size)
        plan = allocator.plan(model, budget, verify=False, profile=profile, engine=ENGINE.name)
        ours = write(model.reference, dict(plan.weights), reference.parents[1], f"plan for {name}")
        assert ours.stat().st_size == plan.memory_bytes <= size
        kl, own = (measure_kl(reference, p, profile.evaluation_tokens) for p in (path, ours))
        rows.append((name, size, kl, plan.memory_bytes, own, plan.predicted_kl))
    return rows


def measure_kl(reference: Path, path: Path, sequences: np.ndarray) -> np.ndarray:
    """Returns the mean KL [S] of a file's logits to the reference file's, nats per token, both of llama.cpp."""
    means = []
    with loaded(reference) as first, loaded(path) as second:
        for tokens in sequences:
            p, q = (torch.from_numpy(engine.logits(tokens)).log_softmax(-1) for engine in (first, second))
            means.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return np.array(means)


def render(rows: list[tuple[str, int, np.ndarray, int, np.ndarray, float]], profile: SensitivityProfile) -> str:
    """Returns the page."""
    sequences, tokens = profile.evaluation_tokens.shape
    lines = [
        "# Plans for llama.cpp, SmolLM2-135M",
        "",
        f"Made by `python benchmarks/bench_llama_cpp.py`. Machine: {describe_machine()}.",
        "",
        f"KL in nats per token on {sequences} sequences of {tokens} tokens that nothing else saw, with half its 95 % "
        "interval: llama.cpp's logits of each file against its logits of the unquantized one. No plan is larger than "
        "its rival, and no file was made with an importance matrix.",
        "",
        "| rival | bytes | KL | plan, bytes | predicted | KL | × rival |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, size, kl, own_bytes, own, predicted in sorted(rows, key=lambda row: row[1]):
        ratio = own.mean() / kl.mean()
        lines.append(f"| {name} | {size} | {_cell(kl)} | {own_bytes} | {predicted:.4f} | {_cell(own)} | {ratio:.3f} |")
    return "\n".join(lines) + "\n"


def _cell(kl: np.ndarray) -> str:
    mean, low, _ = mean_interval(kl)
    return f"{mean:.4f} ± {mean - low:.4f}"


if __name__ == "__main__":
    main()
