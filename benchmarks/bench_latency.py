"""Predicted against measured time of a decode step for random mixed plans, SmolLM2-135M. Writes latency.md.

The table of latencies holds the weights alone; what a step does besides is measured once, on a plan of one format that
is none of those predicted: its step less its weights in the table.
"""

import argparse
import statistics
import sys
import tempfile
import time
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
from runtime.candidates import Candidates, list_candidates
from runtime.compiled_decoder import run_tokens
from runtime.costs import CostTable
from runtime.latency import measure_latency
from runtime.packed_model import load_packed, save_packed_
from runtime.units import find_units

FORMATS = ("int2_g64", "int3_g64", "int4_g64", "int5_g64", "int6_g64", "int8_g64", "int4_g32_sym", "int8_channel_sym")
REST_FORMAT = "int4_g64"
PLANS = 10
PROMPT_TOKENS, STEPS = 16, 48
SEED = 0
Choice = np.ndarray[Any, np.dtype[np.int64]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    directory = prepare_demo_model(Store().root)
    candidates = list_candidates(find_units(allocator.Model(str(directory)).reference.model), FORMATS)
    random = np.random.default_rng(SEED)
    choices = [_draw(candidates, random) for _ in range(PLANS)]
    uniform = np.full(len(candidates.units), candidates.format_index(REST_FORMAT))
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        models = [_pack(directory, candidates, choice, Path(scratch) / str(i)) for i, choice in enumerate(choices)]
        models.append(_pack(directory, candidates, uniform, Path(scratch) / "uniform"))
        # Other work on the machine comes and goes: the table is measured amid the steps it is compared with.
        first = _time_steps(models)
        table = measure_latency(candidates, expert_share=1.0)
        times = [statistics.median(a + b) * 1e6 for a, b in zip(first, _time_steps(models), strict=True)]
    text = "\n".join([*_describe(table), *_rows(table, choices, uniform, times), ""])
    (Path(__file__).parent / "latency.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def _draw(candidates: Candidates, random: np.random.Generator) -> Choice:
    """Returns one of the allowed formats for every unit."""
    return np.array([random.choice(np.flatnonzero(row)) for row in candidates.allowed])


def _pack(directory: Path, candidates: Candidates, choice: Choice, place: Path) -> Any:
    formats = {
        weight.name: candidates.formats[f].name
        for unit, f in zip(candidates.units, choice, strict=True)
        for weight in unit.weights
    }
    save_packed_(allocator.Model(str(directory)).reference, formats, place, metadata={})
    return load_packed(place)[0]


def _time_steps(models: list[Any]) -> list[list[float]]:
    """Returns the seconds of every step of each model, in turns, without the first of a turn."""
    prompt = torch.arange(10, 10 + PROMPT_TOKENS)[None]
    caches: list[Any] = [model(prompt, past_key_values=DynamicCache()).past_key_values for model in models]
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(STEPS // 8):
        for model, cache, measured in zip(models, caches, seconds, strict=True):
            step = partial(run_tokens, model, cache, torch.tensor([[11]]), wanted=1)
            step()
            for _ in range(8):
                start = time.perf_counter()
                step()
                measured.append(time.perf_counter() - start)
    return seconds


def _describe(table: CostTable) -> list[str]:
    return [
        "# Predicted and measured decode steps",
        "",
        f"Made by `python benchmarks/bench_latency.py`. Machine: {describe_machine(('torch',))}; {table.device}.",
        "",
        f"SmolLM2-135M, every weight in a random one of {', '.join(FORMATS)}; medians of {2 * STEPS} steps of one "
        f"token behind {PROMPT_TOKENS} others and more, half of them before the table was measured, half after. The "
        f"rest of a step, which is no weight's, is that of the plan with {REST_FORMAT} everywhere.",
        "",
        "| plan | weights by the table, us | predicted step, us | measured step, us | predicted / measured |",
        "|---|---|---|---|---|",
    ]


def _rows(table: CostTable, choices: list[Choice], uniform: Choice, times: list[float]) -> list[str]:
    rest = times[-1] - table.use(uniform)
    lines = []
    for i, (choice, measured) in enumerate(zip(choices, times, strict=False), 1):
        weights = table.use(choice)
        cells = (f"{weights:.0f}", f"{weights + rest:.0f}", f"{measured:.0f}", f"{(weights + rest) / measured:.3f}")
        lines.append(f"| {i} | {' | '.join(cells)} |")
    off = [abs((table.use(c) + rest) / t - 1) for c, t in zip(choices, times, strict=False)]
    return [*lines, "", f"Rest of a step: {rest:.0f} us. Largest error: {max(off):.1%}."]


if __name__ == "__main__":
    main()
