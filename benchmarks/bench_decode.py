"""SmolLM2-135M by bitplan and by llama.cpp, the same codes in both: tokens a second. Writes decode.md.

    python benchmarks/bench_decode.py [--rounds N] [--files DIRECTORY]

Both run in one process and in turns, a few tokens each, so that other work on the machine meets both; the 10th
percentile of the times of single tokens is compared, and that of the processor time of the process, which other work
lengthens by the caches and the bandwidth that it takes away, but not by its turns on the processor. llama.cpp is the
library inside the wheel xllamacpp. Prefill is compared with the unquantized model in torch, float32.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
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
from runtime.loading import ReferenceModel
from runtime.packed_model import load_packed, save_packed_
from runtime.units import list_weights

sys.path.append(str(Path(__file__).parents[1]))
from tests.llama_cpp_client import loaded  # noqa: E402 (the directory above is not on the path of a script)

TURN_TOKENS = 16
PROMPT_TOKENS = 256
# llama.cpp has these three as q4_0, q5_0 and q8_0: the same codes, the same bytes.
FORMATS = ("int4_g32_sym", "int5_g32_sym", "int8_g32_sym")
PLANS: dict[str, Callable[[int], str]] = {
    "4 bits": lambda _: FORMATS[0],
    "5 bits": lambda _: FORMATS[1],
    "8 bits": lambda _: FORMATS[2],
    "4, 5 and 8 bits mixed": lambda index: FORMATS[index % 3],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=8, help="turns of each program")
    parser.add_argument("--files", type=Path, help="where the models are written, or were by an earlier run")
    options = parser.parse_args()
    directory = prepare_demo_model(Store().root)
    lines = [
        "# Decoding a whole model",
        "",
        f"Made by `python benchmarks/bench_decode.py`. Machine: {describe_machine(('torch', 'xllamacpp'))}.",
        "SmolLM2-135M, all weights in the stated format, group 32, no zero points, the same codes in both programs; "
        f"10th percentile of {options.rounds * TURN_TOKENS} tokens of each, in turns of {TURN_TOKENS}.",
        "",
        "| plan | weights, MB | threads | bitplan, tokens/s | llama.cpp, tokens/s | ratio | ratio of processor time "
        "| GB of weights / processor s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    prefill = [
        f"Prefill of {PROMPT_TOKENS} tokens, the best run of each: processor time, and the others' over it.",
        "",
        "| plan | threads | bitplan, ms | torch float32 | llama.cpp |",
        "|---|---|---|---|---|",
    ]
    dense = allocator.Model(str(directory)).reference.model
    weights = list_weights(dense)
    with tempfile.TemporaryDirectory() as scratch:
        for name, choose in PLANS.items():
            place = (options.files or Path(scratch)) / name.replace(" ", "_")
            formats = {weight: choose(index) for index, weight in enumerate(weights)}
            if not place.exists():
                _write(allocator.Model(str(directory)).reference, formats, place)
            # Each weight is read once a token.
            size = sum(find_format(formats[n]).storage_bytes(weight.shape) for n, weight in weights.items())
            for threads in (1, 2):
                decode_row, prefill_row = _compare(place, size, dense, threads, options.rounds)
                lines.append(f"| {name} | {size / 1e6:.1f} | {threads} | {decode_row} |")
                prefill.append(f"| {name} | {threads} | {prefill_row} |")
            # After each plan, so that a run that is cut short leaves what it has.
            text = "\n".join([*lines, "", *prefill, ""])
            (Path(__file__).parent / "decode.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def _write(reference: ReferenceModel, formats: dict[str, str], place: Path) -> None:
    """Writes the GGUF file and the packed model."""
    place.mkdir(parents=True)
    export(reference, formats, place / "gguf", exporter="llama.cpp")
    save_packed_(reference, formats, place / "packed", metadata={})


def _compare(place: Path, size: int, dense: Any, threads: int, rounds: int) -> tuple[str, str]:
    torch.set_num_threads(threads)
    model, _, _ = load_packed(place / "packed")
    prompt = torch.randint(10, 40000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        engine = stack.enter_context(loaded(place / "gguf" / "model.gguf", context_tokens=1024, threads=threads))
        cache: Any = model(prompt[:, :8], past_key_values=DynamicCache()).past_key_values
        engine.append(prompt[0, :8].numpy(), past=0)

        def ours_next(token: int, past: int) -> int:
            assert cache.get_seq_length() == past
            return int(run_tokens(model, cache, torch.tensor([[token]]), wanted=1).numpy().argmax())

        def theirs_next(token: int, past: int) -> int:
            return int(engine.append(np.array([token]), past=past).argmax())

        times: dict[str, list[tuple[float, float]]] = {"bitplan": [], "llama.cpp": []}
        token = 1
        for past in range(8, 8 + rounds * TURN_TOKENS, TURN_TOKENS):
            for name, step in (("bitplan", ours_next), ("llama.cpp", theirs_next)):
                for position in range(past, past + TURN_TOKENS):
                    seconds, token = _time(partial(step, token, position))
                    times[name].append(seconds)
        ours, theirs = (np.percentile(times[name], 10, axis=0) for name in ("bitplan", "llama.cpp"))
        ratio, processor_ratio = theirs / ours
        rate = size / ours[1] / 1e9
        decode = f"{1 / ours[0]:.0f} | {1 / theirs[0]:.0f} | {ratio:.2f} | {processor_ratio:.2f} | {rate:.1f}"
        runs: dict[str, Callable[[], Any]] = {
            "bitplan": lambda: model(prompt, past_key_values=DynamicCache(), logits_to_keep=1),
            "torch": lambda: dense(prompt, past_key_values=DynamicCache(), logits_to_keep=1),
            "llama.cpp": lambda: engine.append(prompt[0].numpy(), past=0),
        }
        best = {name: float("inf") for name in runs}
        for _ in range(max(1, rounds // 2)):
            for name, run in runs.items():
                best[name] = min(best[name], _time(run)[0][1])
    ratios = " | ".join(f"{best[name] / best['bitplan']:.2f}" for name in ("torch", "llama.cpp"))
    return decode, f"{best['bitplan'] * 1e3:.0f} | {ratios}"


def _time(run: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    started, spent = time.perf_counter(), time.process_time()
    result = run()
    return (time.perf_counter() - started, time.process_time() - spent), result


if __name__ == "__main__":
    main()
