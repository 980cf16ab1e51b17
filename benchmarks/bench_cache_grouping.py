"""One cache format for all layers of SmolLM2-135M, per token or along blocks of tokens. Writes cache_grouping.md."""

import sys
from pathlib import Path

import torch
from machine import describe_machine

from allocator.demo_model import prepare_demo_model
from allocator.demo_text import python_reference_text
from allocator.store import Store
from runtime.cache_formats import CACHE_FORMATS, cache_bytes
from runtime.cache_units import find_cache_units
from runtime.loading import load_reference
from sensitivity.calibration import tokenize_documents
from sensitivity.evaluation import score_assignments

FORMATS = ("int2_g32", "int2_t32", "int3_g32", "int3_t32", "int4_g32", "int4_t32", "int8_channel")
SEQUENCES, SEQUENCE_TOKENS = 2, 160
HALVES = {"key_cache": "keys", "value_cache": "values"}


def main() -> None:
    torch.set_num_threads(1)
    reference = load_reference(str(prepare_demo_model(Store().root)))
    units = find_cache_units(reference.model)
    text = tokenize_documents(
        python_reference_text(),
        reference.tokenizer,
        sequences=SEQUENCES,
        sequence_tokens=SEQUENCE_TOKENS,
        source="Python reference",
    )
    formats = {
        f"{half} {name}": {unit.name: name for unit in units if unit.kind == half}
        for half in HALVES
        for name in FORMATS
    }
    scores = score_assignments(reference.model, formats, text.tokens)
    shape = units[0].cache_shape
    assert shape is not None
    lines = [
        "# One cache format for all layers, SmolLM2-135M",
        "",
        f"Made by `python benchmarks/bench_cache_grouping.py`. Machine: {describe_machine()}.",
        "",
        f"KL in nats per token on {SEQUENCES} x {SEQUENCE_TOKENS} tokens of the Python reference, every token decoded "
        "from the quantized cache; the weights and the other half of the cache are unquantized. `_g32`: groups of 32 "
        "within a head, token by token; `_t32`: every channel along a block of 32 tokens; `_channel`: a whole head. "
        "Bits: per number cached, of complete blocks.",
        "",
        "| format | bits | " + " | ".join(HALVES.values()) + " |",
        "|---|---|---|---|",
    ]
    for name in FORMATS:
        bits = 8 * cache_bytes(CACHE_FORMATS[name], shape, 32) / (32 * shape[0] * shape[1])
        kl = [f"{scores[f'{half} {name}'].kl.mean():.5f}" for half in HALVES]
        lines.append(f"| {name} | {bits:.2f} | {' | '.join(kl)} |")
    table = "\n".join(lines) + "\n"
    (Path(__file__).parent / "cache_grouping.md").write_text(table, encoding="utf-8")
    sys.stdout.write(table)


if __name__ == "__main__":
    main()
