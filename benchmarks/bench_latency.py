"""Predicted against measured time of a decode step for random mixed plans, SmolLM2-135M. Writes latency.md.

The table of latencies holds the weights alone; what a step does besides is measured once, on a plan of one format that
is none of those predicted: its step less its weights in the table.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from torch import nn
from transformers import DynamicCache

from allocator.demo_model import prepare_demo_model
from allocator.store import Store
from runtime.apply import install_empty_formats_
from runtime.candidates import Candidates, list_candidates
from runtime.compiled_decoder import begin_sequence, run_tokens
from runtime.costs import CostTable
from runtime.latency import measure_latency
from runtime.packed_model import prepare_generation_
from runtime.stored_weights import build_empty_model
from runtime.units import find_units

FORMATS = ("int2_g64", "int3_g64", "int4_g64", "int5_g64", "int6_g64", "int8_g64", "int4_g32_sym", "int8_channel_sym")
REST_FORMAT = "int4_g64"
PLANS = 10
PROMPT_TOKENS, STEPS, TURNS = 16, 48, 4
SEED = 0
Choice = np.ndarray[Any, np.dtype[np.int64]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    directory = prepare_demo_model(Store().root)
    candidates = list_candidates(find_units(build_empty_model(directory)), FORMATS)
    random = np.random.default_rng(SEED)
    choices = [_draw(candidates, random) for _ in range(PLANS)]
    uniform = np.full(len(candidates.units), candidates.format_index(REST_FORMAT))
    with torch.inference_mode():
        models = [_build(directory, candidates, choice) for choice in (*choices, uniform)]
        # Other work on the machine comes and goes, for minutes at a time, and makes all slower: steps are measured
        # before and after the table, and of each plan the fastest turn counts, as it does in the table.
        steps = [_time_steps(models) for _ in range(TURNS // 2)]
        table = measure_latency(candidates, expert_share=1.0)
        steps += [_time_steps(models) for _ in range(TURNS // 2)]
        times = [min(map(statistics.median, turns)) * 1e6 for turns in zip(*steps, strict=True)]
    text = "\n".join([*_describe(table), *_rows(table, choices, uniform, times), ""])
    (Path(__file__).parent / "latency.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def _draw(candidates: Candidates, random: np.random.Generator) -> Choice:
    """Returns one of the allowed formats for every unit."""
    return np.array([random.choice(np.flatnonzero(row)) for row in candidates.allowed])


def _build(directory: Path, candidates: Candidates, choice: Choice) -> Any:
    """Returns the model packed by a plan; its codes are zeros, for times do not depend on them."""
    model = build_empty_model(directory)
    formats = {
        weight.name: candidates.formats[f].name
        for unit, f in zip(candidates.units, choice, strict=True)
        for weight in unit.weights
    }
    install_empty_formats_(model, formats)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    filled = torch.zeros(tensor.shape, dtype=tensor.dtype)
                    tensors[name] = nn.Parameter(filled, False) if tensors is module._parameters else filled
    prepare_generation_(model)
    assert begin_sequence(model) is not None, "the model must run by the compiled decoder"
    return model


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
        f"SmolLM2-135M, every weight in a random one of {', '.join(FORMATS)}; steps of one token behind "
        f"{PROMPT_TOKENS} others and more. Medians of {STEPS} steps, the fastest of {TURNS} turns, half of "
        "them before the table of latencies was made, as `plan` makes it, and half behind it. The rest of a step, "
        f"which is no weight's, is that of the plan with {REST_FORMAT} everywhere.",
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
