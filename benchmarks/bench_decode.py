"""SmolLM2-135M by bitplan and by llama.cpp, the same codes in both: tokens a second. Writes decode.md.

    python benchmarks/bench_decode.py [--rounds N] [--files DIRECTORY [--seconds S]] [--llama-cpp LIBRARY]

All run in one process and in turns, a few tokens each, so that other work on the machine meets all of them; the 10th
percentile of the times of single tokens is compared, and that of the processor time of the process, which other work
lengthens by the caches and the bandwidth that it takes away, but not by its turns on the processor. llama.cpp is the
library inside the wheel xllamacpp, which knows AVX2, and LIBRARY, a libllama.so that was compiled for this machine
(cmake -DBUILD_SHARED_LIBS=ON in the sources of llama-cpp-python; GGML_NATIVE is the default). Prefill is compared with
the unquantized model in torch, float32, as well.

Models and figures are kept in DIRECTORY: a run that ends after S seconds is continued by the next.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from transformers import DynamicCache

import allocator
from allocator.demo_model import prepare_demo_model
from allocator.store import Store
from runtime.compiled_decoder import run_tokens
from runtime.exporters import export
from runtime.formats import find_format
from runtime.kernels.dispatch import AUTOMATIC, kernel_path
from runtime.loading import ReferenceModel
from runtime.packed_model import load_packed, save_packed_
from runtime.units import list_weights

sys.path.append(str(Path(__file__).parents[1]))
from tests.llama_cpp_client import instruction_sets, loaded  # noqa: E402 (the directory above is not on a script's path)

TURN_TOKENS = 16
PROMPT_TOKENS = 256
THREADS = (1, 2)
# llama.cpp has these three as q4_0, q5_0 and q8_0: the same codes, the same bytes.
FORMATS = ("int4_g32_sym", "int5_g32_sym", "int8_g32_sym")
PLANS: dict[str, Callable[[int], str]] = {
    "4 bits": lambda _: FORMATS[0],
    "5 bits": lambda _: FORMATS[1],
    "8 bits": lambda _: FORMATS[2],
    "4, 5 and 8 bits mixed": lambda index: FORMATS[index % 3],
}
OURS, WHEEL, NATIVE, TORCH = "bitplan", "llama.cpp (wheel)", "llama.cpp (compiled here)", "torch float32"
OURS_AVX2 = "bitplan with AVX2"
# What is kept of a plan at a number of threads: seconds by program, of a token [wall, processor] and of a prompt.
Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=8, help="turns of each program")
    parser.add_argument("--files", type=Path, help="where models and figures are kept, or were by an earlier run")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--llama-cpp", type=Path, help="a libllama.so for this machine, beside the wheel's")
    options = parser.parse_args()
    libraries = {WHEEL: None} | ({NATIVE: options.llama_cpp} if options.llama_cpp else {})
    stop = time.monotonic() + options.seconds
    reference = _read_reference()
    weights = list_weights(reference.model)
    kept: dict[tuple[str, int], Figures] = {}
    with tempfile.TemporaryDirectory() as scratch:
        # One thread first: a run that is cut short has it for all plans.
        for threads, (name, choose) in product(THREADS, PLANS.items()):
            place = (options.files or Path(scratch)) / name.replace(" ", "_")
            formats = {weight: choose(index) for index, weight in enumerate(weights)}
            if not place.exists():
                _write(_read_reference(), formats, place)
            file = place / f"{threads}_threads.json"
            if not file.exists() and time.monotonic() < stop:
                figures = _measure(place, reference.model, threads, options.rounds, libraries)
                # Each weight is read once a token.
                figures["bytes"] = sum(find_format(formats[n]).storage_bytes(w.shape) for n, w in weights.items())
                file.write_text(json.dumps(figures), encoding="utf-8")
            if file.exists():
                kept[name, threads] = json.loads(file.read_text(encoding="utf-8"))
    text = "\n".join([*_describe(options.rounds, libraries), *_decode_table(kept), "", *_prefill_table(kept), ""])
    (Path(__file__).parent / "decode.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def _read_reference() -> ReferenceModel:
    return allocator.Model(str(prepare_demo_model(Store().root))).reference


def _write(reference: ReferenceModel, formats: dict[str, str], place: Path) -> None:
    """Writes the GGUF file and the packed model."""
    place.mkdir(parents=True)
    export(reference, formats, place / "gguf", exporter="llama.cpp")
    save_packed_(reference, formats, place / "packed", metadata={})


def _measure(place: Path, dense: Any, threads: int, rounds: int, libraries: dict[str, Path | None]) -> Figures:
    torch.set_num_threads(threads)
    model, _, _ = load_packed(place / "packed")
    prompt = torch.randint(10, 40000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        file = place / "gguf" / "model.gguf"
        engines = {
            name: stack.enter_context(loaded(file, context_tokens=1024, threads=threads, library_path=library))
            for name, library in libraries.items()
        }
        decode = _time_tokens(model, engines, prompt[:, :8], rounds)
        runs: dict[str, Callable[[], Any]] = {
            OURS: lambda: model(prompt, past_key_values=DynamicCache(), logits_to_keep=1),
            TORCH: lambda: dense(prompt, past_key_values=DynamicCache(), logits_to_keep=1),
        }
        runs |= {name: partial(engine.append, prompt[0].numpy(), past=0) for name, engine in engines.items()}
        prefill = dict.fromkeys(runs, float("inf"))
        for _ in range(max(1, rounds // 2)):
            for name, run in runs.items():
                prefill[name] = min(prefill[name], _time(run)[0][1])
    return {"decode": decode, "prefill": prefill}


def _time_tokens(model: Any, engines: dict[str, Any], prompt: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds and the processor seconds of a token by program."""
    caches: list[Any] = [model(prompt, past_key_values=DynamicCache()).past_key_values for _ in range(2)]

    def ours_next(path: str, cache: Any, token: int, past: int) -> int:
        assert cache.get_seq_length() == past
        with kernel_path(path):
            return int(run_tokens(model, cache, torch.tensor([[token]]), wanted=1).numpy().argmax())

    def theirs_next(engine: Any, token: int, past: int) -> int:
        return int(engine.append(np.array([token]), past=past).argmax())

    steps: dict[str, Callable[[int, int], int]] = {OURS: partial(ours_next, AUTOMATIC, caches[0])}
    for name, engine in engines.items():
        engine.append(prompt[0].numpy(), past=0)
        steps[name] = partial(theirs_next, engine)
    steps[OURS_AVX2] = partial(ours_next, "avx2", caches[1])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    token, first = 1, prompt.shape[1]
    for past in range(first, first + rounds * TURN_TOKENS, TURN_TOKENS):
        for name, step in steps.items():
            for position in range(past, past + TURN_TOKENS):
                seconds, token = _time(partial(step, token, position))
                times[name].append(seconds)
    return {name: np.percentile(measured, 10, axis=0).tolist() for name, measured in times.items()}


def _time(run: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    started, spent = time.perf_counter(), time.process_time()
    result = run()
    return (time.perf_counter() - started, time.process_time() - spent), result


def _describe(rounds: int, libraries: dict[str, Path | None]) -> list[str]:
    compiled_for = "; ".join(f"{name}: {instruction_sets(library)}" for name, library in libraries.items())
    return [
        "# Decoding a whole model",
        "",
        f"Made by `python benchmarks/bench_decode.py`. Machine: {describe_machine(('torch', 'xllamacpp'))}. "
        f"{compiled_for}.",
        "SmolLM2-135M, all weights in the stated format, group 32, no zero points, the same codes in all programs; "
        f"10th percentile of {rounds * TURN_TOKENS} tokens of each, in turns of {TURN_TOKENS}. *Ratio*: time of the "
        "fastest llama.cpp over that of bitplan, and the same of processor time; *with AVX2*: of the wheel, which has "
        "no more than that, over bitplan's with its kernels for AVX2.",
        "",
    ]


def _decode_table(kept: dict[tuple[str, int], Figures]) -> list[str]:
    names = next(iter(kept.values()))["decode"] if kept else ()
    titles = ["plan", "weights, MB", "threads", *(f"{name}, tokens/s" for name in names)]
    ratio_titles = ("ratio", "ratio of processor time", "ratio with AVX2", "GB of weights / processor s")
    lines = _begin_table([*titles, *ratio_titles])
    for (plan, threads), figures in kept.items():
        ours, *theirs, narrow = figures["decode"].values()
        rates = (f"{1 / seconds:.0f}" for seconds, _ in figures["decode"].values())
        ratios = (f"{min(t) / o:.2f}" for o, t in zip(ours, zip(*theirs, strict=True), strict=True))
        size, with_avx2 = figures["bytes"], figures["decode"][WHEEL][0] / narrow[0]
        lines.append(
            _row(
                [
                    plan,
                    f"{size / 1e6:.1f}",
                    str(threads),
                    *rates,
                    *ratios,
                    f"{with_avx2:.2f}",
                    f"{size / ours[1] / 1e9:.1f}",
                ]
            )
        )
    return lines


def _prefill_table(kept: dict[tuple[str, int], Figures]) -> list[str]:
    names = [name for name in next(iter(kept.values()))["prefill"] if name != OURS] if kept else []
    lines = [f"Prefill of {PROMPT_TOKENS} tokens, the best run of each: processor time, and the others' over it.", ""]
    lines += _begin_table(["plan", "threads", "bitplan, ms", *names])
    for (plan, threads), figures in kept.items():
        ours = figures["prefill"][OURS]
        ratios = (f"{figures['prefill'][name] / ours:.2f}" for name in names)
        lines.append(_row([plan, str(threads), f"{ours * 1e3:.0f}", *ratios]))
    return lines


def _begin_table(titles: list[str]) -> list[str]:
    return [_row(titles), "|" + "---|" * len(titles)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
