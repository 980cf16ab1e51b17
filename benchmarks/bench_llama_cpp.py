"""Plans against llama.cpp's own mixes of the same file size, on SmolLM2-135M. Writes llama_cpp.md.

    python benchmarks/bench_llama_cpp.py [--tools DIRECTORY] [--refine ROUNDS] [--chunks CHUNKS]

The rivals are made by llama-quantize from the unquantized file that bitplan exports, once without an importance matrix
and once with one, which is bitplan's own: both sides then know the same of the inputs. The size of each rival's file is
the budget of a plan, so that a plan is never a byte larger. All KL is llama-perplexity's. How to build the two programs
is in ``llama_cpp_tools.py``.

All of it is kept in the store and found again: profiles, measured plans, files.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from llama_cpp_tools import CONTEXT_TOKENS, Tools
from machine import describe_machine

import allocator
from allocator.artefacts import Model
from allocator.demo import demo_request
from allocator.demo_model import prepare_demo_model
from allocator.demo_text import python_reference_text
from allocator.progress import Progress, shown_progress
from allocator.store import Store
from runtime.engines import find_engine
from runtime.exporters import export
from runtime.units import list_weights
from sensitivity.measure_config import MeasureConfig
from sensitivity.profile import SensitivityProfile

ENGINE = find_engine("llama.cpp")
MIXES = ("Q3_K_S", "Q4_0", "Q3_K_M", "Q4_K_M", "Q5_K_M")
# Whether an importance matrix is used -> the rule that renders our candidates.
QUANTIZERS = {False: "rtn", True: "weighted_clipping"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A rival and the plan of its size.

    Args:
        mix: llama.cpp's name of the rival.
        weighted: Whether both sides used the importance matrix.
        bytes: Bytes of the rival's file, of the plan's.
        kl: Mean KL of the rival, of the plan, nats per token.
        std_error: Standard errors of these.
        predicted: KL that the plan predicted.
    """

    mix: str
    weighted: bool
    bytes: tuple[int, int]
    kl: tuple[float, float]
    std_error: tuple[float, float]
    predicted: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tools", type=Path, help="directory of llama-quantize and llama-perplexity")
    parser.add_argument("--refine", type=int, default=4, help="rounds of refinement")
    parser.add_argument("--chunks", type=int, default=12, help=f"pieces of {CONTEXT_TOKENS} tokens of the text")
    options = parser.parse_args()
    tools, store = Tools.find(options.tools), Store()
    place = store.root / "llama.cpp"
    place.mkdir(parents=True, exist_ok=True)
    model = Model(str(prepare_demo_model(store.root)))
    with shown_progress() as progress:
        base = write_base(model, tools, place, options.chunks)
        rows = []
        for weighted, quantizer in QUANTIZERS.items():
            profile = measure(model, quantizer, store, progress)
            imatrix = write_imatrix(model, profile, place, store) if weighted else None
            shared = (imatrix, model, profile, tools, base, options.refine, store, progress)
            rows += [compare(mix, *shared) for mix in MIXES]
    text = render(rows, options.refine, options.chunks)
    (Path(__file__).parent / "llama_cpp.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def write_base(model: Model, tools: Tools, place: Path, chunks: int) -> Path:
    """Returns the file of the unquantized model's logits on the text that nothing else saw."""
    text, base = place / "python-reference.txt", place / f"base-{chunks}.dat"
    if not base.exists():
        formats = dict.fromkeys(list_weights(model.reference.model), "fp16")
        export(model.reference, formats, place / "F16", exporter=ENGINE.exporter)
        text.write_text("\n\n".join(python_reference_text()), encoding="utf-8")
        tools.write_base(place / "F16" / "model.gguf", text, base, chunks)
    return base


def measure(model: Model, quantizer: str, store: Store, progress: Progress) -> SensitivityProfile:
    """Returns the profile of the formats that llama.cpp runs."""
    config = MeasureConfig(quantizer=quantizer, fisher_sequences=48, logit_passes=320, fit_plans=None)
    request = replace(demo_request(store), formats=ENGINE.menu, embedding_formats=ENGINE.menu, config=config)
    return allocator.measure(model, request=request, store=store, progress=progress)


def write_imatrix(model: Model, profile: SensitivityProfile, place: Path, store: Store) -> Path:
    """Returns our importance matrix, written beside a plan of a profile."""
    plan = allocator.plan(
        model, allocator.Budget(bits_per_weight=16), verify=False, profile=profile, engine=ENGINE.name, store=store
    )
    allocator.export(model, plan, ENGINE.name, place / "weighted", imatrix=True, store=store)
    return place / "weighted" / "imatrix.gguf"


def compare(
    mix: str,
    imatrix: Path | None,
    model: Model,
    profile: SensitivityProfile,
    tools: Tools,
    base: Path,
    refine: int,
    store: Store,
    progress: Progress,
) -> Row:
    """Returns a rival beside the plan of its size."""
    name = mix if imatrix is None else f"{mix} with importance matrix"
    rival = base.parent / f"{name}.gguf"
    if not rival.exists():
        tools.make_mix(base.parent / "F16" / "model.gguf", rival, mix, imatrix)
    size = rival.stat().st_size
    plan = allocator.plan(
        model,
        allocator.Budget(memory_bytes=size),
        profile=profile,
        engine=ENGINE.name,
        refine=refine,
        store=store,
        progress=progress,
    )
    allocator.save_plan(plan, base.parent / f"{name}, plan.json")
    out = base.parent / f"{name}, plan"
    allocator.export(model, plan, ENGINE.name, out, store=store)
    ours = out / "model.gguf"
    assert ours.stat().st_size == plan.memory_bytes <= size, (
        "the file is as long as predicted, and no longer than the rival"
    )
    measured = [measured_kl(path, base, tools) for path in (rival, ours)]
    return Row(
        mix=mix,
        weighted=imatrix is not None,
        bytes=(size, plan.memory_bytes),
        kl=(measured[0][0], measured[1][0]),
        std_error=(measured[0][1], measured[1][1]),
        predicted=plan.predicted_kl,
    )


def measured_kl(path: Path, base: Path, tools: Tools) -> tuple[float, float]:
    """Returns the mean KL of a file and its standard error, measured once for each content of the file."""
    kept = path.with_suffix(f".{base.stem}.json")
    stamp = [path.stat().st_size, path.stat().st_mtime_ns]
    if kept.exists():
        document = json.loads(kept.read_text(encoding="utf-8"))
        if document["stamp"] == stamp:
            return document["kl"], document["std_error"]
    kl, std_error = tools.measure_kl(path, base)
    kept.write_text(json.dumps({"stamp": stamp, "kl": kl, "std_error": std_error}), encoding="utf-8")
    return kl, std_error


def render(rows: list[Row], refine: int, chunks: int) -> str:
    """Returns the page."""
    lines = [
        "# Plans for llama.cpp beside its own mixes, SmolLM2-135M",
        "",
        f"Made by `python benchmarks/bench_llama_cpp.py --refine {refine} --chunks {chunks}`. Machine: "
        f"{describe_machine()}.",
        "",
        "Mean KL to the unquantized model, nats per token ± its standard error, measured by llama-perplexity on "
        f"{chunks} pieces of {CONTEXT_TOKENS} tokens of the Python reference, which nothing else saw. "
        "llama.cpp's files are llama-quantize's. No plan is larger than its rival, and each file is as long as its "
        "plan predicted, to the byte. "
        "With an importance matrix, both sides have the same one, which bitplan wrote from the calibration text.",
    ]
    for weighted in QUANTIZERS:
        title = "With an importance matrix" if weighted else "Without an importance matrix"
        lines += [
            "",
            f"## {title}",
            "",
            "| size of | bytes | llama.cpp | plan, bytes | plan | predicted | plan / llama.cpp |",
        ]
        lines.append("|---|---|---|---|---|---|---|")
        for row in sorted((row for row in rows if row.weighted == weighted), key=lambda row: row.bytes[0]):
            theirs, ours = (f"{kl:.4f} ± {error:.4f}" for kl, error in zip(row.kl, row.std_error, strict=True))
            ratio = row.kl[1] / row.kl[0]
            cells = [row.mix, row.bytes[0], theirs, row.bytes[1], ours, f"{row.predicted:.4f}", f"**{ratio:.2f}**"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
