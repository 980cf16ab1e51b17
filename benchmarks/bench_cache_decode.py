"""Tokens of SmolLM2-135M on a CPU behind a past that is packed, by the compiled decoder and module by module.

    python benchmarks/bench_cache_decode.py [--rounds N]

Weights in int4_g64. All caches hold the same tokens and are stepped in turns in one process; of each the lower quartile
of the rounds counts. The way module by module is timed at the shortest past alone. Writes cache_decode.md.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from torch import Tensor

from allocator.artefacts import Model
from allocator.demo_model import prepare_demo_model
from allocator.store import Store
from runtime.apply import apply_formats_
from runtime.cache_formats import CACHE_FORMATS, CacheLoad
from runtime.cache_units import find_cache_units
from runtime.compiled_decoder import begin_packed_sequence, begin_sequence
from runtime.costs import unit_bytes
from runtime.decoder_run import run_tokens
from runtime.packed_model import prepare_generation_
from runtime.quantized_cache import QuantizedCache
from runtime.units import list_weights

PLAIN, SLOW = "float32", "int4_g32, module by module"
# Formats of keys and values; None for the compiled decoder's own states.
MIXES: dict[str, tuple[str, str] | None] = {
    PLAIN: None,
    "bf16": ("bf16", "bf16"),
    "int8_g32": ("int8_g32", "int8_g32"),
    "int4_g32": ("int4_g32", "int4_g32"),
    "int4_t32, int4_g32": ("int4_t32", "int4_g32"),
    "int2_t32, int3_g32": ("int2_t32", "int3_g32"),
}
PAST = (64, 512, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Model(str(prepare_demo_model(Store().root))).reference.model
    apply_formats_(model, dict.fromkeys(list_weights(model), "int4_g64"))
    prepare_generation_(model)
    lines = [
        "# Decoding behind a packed cache",
        "",
        f"Made by `python benchmarks/bench_cache_decode.py`. Machine: {describe_machine(('torch', 'transformers'))}, "
        f"one thread. SmolLM2-135M, weights in int4_g64; milliseconds a token, the lower quartile of {options.rounds} "
        "rounds, all caches in turns; in brackets over a cache in float32. *Module by module* is the model's own "
        "forward, which reads all of the past back at every token, as transformers' caches do.",
        "",
        f"| keys, values | MiB at {PAST[-1]} tokens | {' | '.join(f'{past} past' for past in PAST)} |",
        "|---|---|" + "---|" * len(PAST),
    ]
    cells: dict[str, list[str]] = {}
    for past in PAST:
        tokens = torch.randint(2, model.config.vocab_size, (1, past), generator=torch.Generator().manual_seed(0))
        ways = {name: make_compiled(model, tokens, mix) for name, mix in MIXES.items()}
        if past == PAST[0]:
            ways[SLOW] = make_module_by_module(model, tokens)
        quartiles = time_in_turns(ways, options.rounds)
        for name, seconds in quartiles.items():
            cells.setdefault(name, []).append(f"{1e3 * seconds:.1f} ({seconds / quartiles[PLAIN]:.2f})")
    for name, found in cells.items():
        lines.append(
            f"| {name} | {count_mib(model, name):.1f} | {' | '.join(found + [''] * (len(PAST) - len(found)))} |"
        )
    page = "\n".join(lines) + "\n"
    (Path(__file__).parent / "cache_decode.md").write_text(page, encoding="utf-8")
    sys.stdout.write(page)


def make_cache(model: Any, mix: tuple[str, str]) -> QuantizedCache:
    """Returns an empty cache in formats of keys and of values."""
    return QuantizedCache(model, {unit.name: mix[i % 2] for i, unit in enumerate(find_cache_units(model))})


def make_compiled(model: Any, tokens: Tensor, mix: tuple[str, str] | None) -> Callable[[], object]:
    """Returns what runs one more token behind others by the compiled decoder."""
    sequence = begin_sequence(model) if mix is None else begin_packed_sequence(model, make_cache(model, mix))
    assert sequence is not None, "the CPU kernels must be there"
    run_tokens(model, sequence, tokens, wanted=1)
    return lambda: run_tokens(model, sequence, tokens[:, :1], wanted=1)


def make_module_by_module(model: Any, tokens: Tensor) -> Callable[[], object]:
    """Returns what runs one more token behind others by the forward of the model's class in transformers."""
    cache = make_cache(model, ("int4_g32", "int4_g32"))
    forward = type(model).__mro__[2].forward

    @torch.no_grad()
    def run(part: Tensor) -> object:
        return forward(model, part, past_key_values=cache)

    run(tokens)
    return lambda: run(tokens[:, :1])


def time_in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Returns the lower quartile of the seconds of each way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.quantile(found, 0.25)) for name, found in seconds.items()}


def count_mib(model: Any, name: str) -> float:
    """Returns the MiB that a cache of the longest past takes."""
    units, load = find_cache_units(model), CacheLoad(context=PAST[-1], batch=1)
    mix = MIXES["int4_g32" if name == SLOW else name]
    if mix is None:
        numbers = sum(heads * dim for heads, dim in (unit.cache_shape or (0, 0) for unit in units))
        return 4 * numbers * PAST[-1] / 2**20
    return sum(unit_bytes(unit, CACHE_FORMATS[mix[i % 2]], load) for i, unit in enumerate(units)) / 2**20


if __name__ == "__main__":
    main()
