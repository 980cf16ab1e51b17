"""SmolLM2-135M by bitplan and by llama.cpp, the same codes in both: tokens a second. Writes decode.md.

    python benchmarks/bench_decode.py [--rounds N]

Both run in one process and in turns, a few tokens each, so that other work on the machine meets both; the 10th
percentile of the times of single tokens is compared. llama.cpp is the library inside the wheel xllamacpp. Prefill is
compared with the unquantized model in torch, float32.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
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
    options = parser.parse_args()
    directory = prepare_demo_model(Store().root)
    lines = [
        "# Decoding a whole model",
        "",
        f"Made by `python benchmarks/bench_decode.py`. Machine: {describe_machine(('torch', 'xllamacpp'))}.",
        f"SmolLM2-135M, all weights in the stated format, group 32 without zero points, the same codes in both programs; "
        f"10th percentile of {options.rounds * TURN_TOKENS} tokens of each, in turns of {TURN_TOKENS}.",
        "",
        "| plan | weights, MB | threads | bitplan, tokens/s | llama.cpp, tokens/s | ratio | bitplan, GB/s |",
        "|---|---|---|---|---|---|---|",
    ]
    prefill = [
        f"Prefill of {PROMPT_TOKENS} tokens, best of {options.rounds // 2}: ms, and the time of each over bitplan's.",
        "",
        "| plan | threads | bitplan, ms | torch float32 | llama.cpp |",
        "|---|---|---|---|---|",
    ]
    dense = allocator.Model(str(directory)).reference.model
    with tempfile.TemporaryDirectory() as scratch:
        for name, choose in PLANS.items():
            place = Path(scratch) / name.replace(" ", "_")
            size = _write(allocator.Model(str(directory)).reference, choose, place)
            for threads in (1, 2):
                decode_row, prefill_row = _compare(place, size, dense, threads, options.rounds)
                lines.append(f"| {name} | {size / 1e6:.1f} | {threads} | {decode_row} |")
                prefill.append(f"| {name} | {threads} | {prefill_row} |")
                sys.stderr.write(f"{lines[-1]}\n{prefill[-1]}\n")
    text = "\n".join([*lines, "", *prefill, ""])
    (Path(__file__).parent / "decode.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def _write(reference: ReferenceModel, choose: Callable[[int], str], place: Path) -> int:
    """Writes the GGUF file and the packed model; returns the bytes of all weights, each read once a token."""
    weights = list_weights(reference.model)
    formats = {name: choose(index) for index, name in enumerate(weights)}
    export(reference, formats, place / "gguf", exporter="llama.cpp")
    save_packed_(reference, formats, place / "packed", metadata={})
    return sum(find_format(formats[name]).storage_bytes(weight.shape) for name, weight in weights.items())


def _compare(place: Path, size: int, dense: Any, threads: int, rounds: int) -> tuple[str, str]:
    torch.set_num_threads(threads)
    model, _, _ = load_packed(place / "packed")
    prompt = torch.randint(10, 40000, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        engine = stack.enter_context(loaded(place / "gguf" / "model.gguf", context_tokens=1024, threads=threads))
        cache: Any = model(prompt[:, :8], past_key_values=DynamicCache()).past_key_values
        engine.append(prompt[0, :8].numpy(), past=0)
        times: dict[str, list[float]] = {"bitplan": [], "llama.cpp": []}
        token = 1
        for turn in range(rounds):
            past = 8 + turn * TURN_TOKENS
            for i in range(TURN_TOKENS):
                seconds, token = _time(
                    lambda t=token: int(run_tokens(model, cache, torch.tensor([[t]]), wanted=1).argmax())
                )  # type: ignore[misc]
                times["bitplan"].append(seconds)
            for i in range(TURN_TOKENS):
                seconds, token = _time(lambda t=token, n=past + i: int(engine.append(np.array([t]), past=n).argmax()))  # type: ignore[misc]
                times["llama.cpp"].append(seconds)
        ours, theirs = (float(np.percentile(times[name], 10)) for name in ("bitplan", "llama.cpp"))
        decode = f"{1 / ours:.0f} | {1 / theirs:.0f} | {theirs / ours:.2f} | {size / ours / 1e9:.1f}"
        runs: dict[str, Callable[[], Any]] = {
            "bitplan": lambda: model(prompt, past_key_values=DynamicCache(), logits_to_keep=1),
            "torch": lambda: dense(prompt, past_key_values=DynamicCache(), logits_to_keep=1),
            "llama.cpp": lambda: engine.append(prompt[0].numpy(), past=0),
        }
        best = {name: float("inf") for name in runs}
        for _ in range(max(1, rounds // 2)):
            for name, run in runs.items():
                best[name] = min(best[name], _time(run)[0])
    ratios = " | ".join(f"{best[name] / best['bitplan']:.2f}" for name in ("torch", "llama.cpp"))
    return decode, f"{best['bitplan'] * 1e3:.0f} | {ratios}"


def _time(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()
