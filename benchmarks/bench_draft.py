"""SmolLM2-135M in nested weights: both widths, and greedy decoding by drafts at the low one. Writes draft.md.

    python benchmarks/bench_draft.py [--rounds N] [--prompts N]

All ways of generating run in one process and in turns over the same prompts; of each prompt and way the fastest run
counts, less that of a single token, which is the prompt's.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_quantizers import log_probabilities
from machine import describe_machine
from torch import Tensor

from allocator.artefacts import Model
from allocator.demo import demo_request
from allocator.demo_model import prepare_demo_model
from allocator.measuring import prepare_text
from allocator.store import Store
from runtime.apply import apply_formats_
from runtime.compiled_decoder import begin_sequence, run_tokens
from runtime.draft_generation import DraftCount, continue_with_drafts
from runtime.formats import find_format
from runtime.greedy_generation import continue_greedily
from runtime.packed_model import prepare_generation_
from runtime.read_widths import read_at_width
from runtime.units import list_weights

FORMATS = ("nested4_8_g32", "nested4_6_g32")
DRAFT_TOKENS = (1, 2, 3, 4, 6)
PASS_TOKENS = (1, 2, 3, 4)
PROMPT_TOKENS, NEW_TOKENS, SAMPLES = 12, 48, 30
KL_SEQUENCES = 8

READING = (
    "## Why drafts do not pay here",
    "",
    "A pass over four tokens costs two to three passes over one: at four bits the kernels are bound by their "
    "instructions, not by the reading of weights, which is all that the tokens share. And a draft costs half of a "
    "pass at the full width. So little is to be gained even if every draft were kept, and at the share that is kept "
    "nothing is. Tried: 1 to 6 drafts; verification of up to 12 tokens by the kernels of prompts, which took 1.5 times "
    "as long; a full width of 6 bits, at which no more drafts are kept.",
)


@dataclass(kw_only=True)
class Way:
    """A way of generating, and what was measured of it."""

    title: str
    run: Callable[[Tensor, int], tuple[Tensor, DraftCount | None]]
    fastest_s: dict[tuple[int, int], float]
    counts: dict[int, DraftCount]
    texts: dict[int, list[int]]

    @property
    def tokens_per_s(self) -> float:
        """New tokens behind the first of every prompt, over the time they took."""
        prompts = {prompt for prompt, _ in self.fastest_s}
        new = sum(len(self.texts[prompt]) - PROMPT_TOKENS - 1 for prompt in prompts)
        return new / sum(self.fastest_s[p, NEW_TOKENS] - self.fastest_s[p, 1] for p in prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    directory, store = str(prepare_demo_model(Store().root)), Store()
    reference = Model(directory).reference
    text = prepare_text(reference, demo_request(store)).evaluation.tokens
    before = log_probabilities(reference.model, text[:KL_SEQUENCES])
    prompts = [text[i : i + 1, :PROMPT_TOKENS] for i in range(options.prompts)]
    lines = _describe(options)
    for name in FORMATS:
        nested = _pack(directory, name)
        plain = {f: _pack(directory, f) for f in (f"int{find_format(name).bits}_g32_sym", "int4_g32_sym")}
        lines += ["", f"## {name}", ""]
        lines += _width_rows(nested, plain, text[:KL_SEQUENCES], before)
        lines += ["", *_pass_rows(nested)]
        ways = list(_list_ways(nested, plain))
        _run_in_turns(ways, prompts, options.rounds)
        lines += ["", *_way_rows(ways)]
    page = "\n".join([*lines, "", *READING]) + "\n"
    (Path(__file__).parent / "draft.md").write_text(page, encoding="utf-8")
    sys.stdout.write(page)


def _pack(directory: str, format_name: str) -> Any:
    model = Model(directory).reference.model
    apply_formats_(model, dict.fromkeys(list_weights(model), format_name))
    prepare_generation_(model)
    return model


def _list_ways(nested: Any, plain: dict[str, Any]) -> Iterator[Way]:
    def make(title: str, run: Callable[[Tensor, int], tuple[Tensor, DraftCount | None]]) -> Way:
        return Way(title=title, run=run, fastest_s={}, counts={}, texts={})

    def greedily(model: Any, prompt: Tensor, count: int) -> tuple[Tensor, None]:
        tokens = continue_greedily(model, prompt, max_new_tokens=count)
        assert tokens is not None
        return tokens, None

    def at_low_width(prompt: Tensor, count: int) -> tuple[Tensor, None]:
        with read_at_width(nested, 4):
            return greedily(nested, prompt, count)

    yield make("full width", partial(greedily, nested))
    yield make("low width", at_low_width)
    for title, model in plain.items():
        yield make(f"{title}, not nested", partial(greedily, model))
    for draft_tokens in DRAFT_TOKENS:
        yield make(f"{draft_tokens} drafted", partial(_draft, nested, draft_tokens))


def _draft(model: Any, draft_tokens: int, prompt: Tensor, count: int) -> tuple[Tensor, DraftCount]:
    return continue_with_drafts(model, prompt, max_new_tokens=count, draft_tokens=draft_tokens, width=4)


def _run_in_turns(ways: list[Way], prompts: list[Tensor], rounds: int) -> None:
    for _ in range(rounds):
        for number, prompt in enumerate(prompts):
            for way in ways:
                for count in (1, NEW_TOKENS):
                    started = time.perf_counter()
                    tokens, drafts = way.run(prompt, count)
                    seconds = time.perf_counter() - started
                    key = number, count
                    way.fastest_s[key] = min(seconds, way.fastest_s.get(key, seconds))
                way.texts[number] = tokens[0].tolist()
                if drafts is not None:
                    way.counts[number] = drafts


def _width_rows(nested: Any, plain: dict[str, Any], tokens: Tensor, before: list[Tensor]) -> list[str]:
    def row(title: str, model: Any, bits: float) -> str:
        after = log_probabilities(model, tokens)
        kl = np.mean([float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(before, after, strict=True)])
        return f"| {title} | {bits:.2f} | {kl:.4f} |"

    shape = (1, 576)

    def bits_of(name: str) -> float:
        return find_format(name).storage_bytes(shape) * 8 / shape[1]

    format_ = next(module.format for module in nested.modules() if hasattr(module, "format"))
    rows = ["| read as | bits of a weight that are read | KL to the reference |", "|---|---|---|"]
    rows.append(row("full width", nested, bits_of(format_.name)))
    with read_at_width(nested, 4):
        rows.append(row("low width", nested, bits_of("int4_g32_sym")))
    return rows + [row(f"{name}, not nested", model, bits_of(name)) for name, model in plain.items()]


def _pass_rows(nested: Any) -> list[str]:
    rows = ["| tokens of a pass | " + " | ".join(map(str, PASS_TOKENS)) + " |", "|---|" + "---|" * len(PASS_TOKENS)]
    times: dict[int, list[float]] = {}
    for title, width in (("low width", 4), ("full width", 8)):
        with read_at_width(nested, width), torch.inference_mode():
            times[width] = _time_passes(nested)
        rows.append(_row(f"{title}, ms", [f"{1e3 * seconds:.2f}" for seconds in times[width]]))
        rows.append(_row(f"{title}, over one token", [f"{s / times[width][0]:.2f}" for s in times[width]]))
    low, full = times[4][0], times[8]
    # A verification of n tokens follows n - 1 drafts and gives n tokens at best.
    best = [n * full[0] / ((n - 1) * low + seconds) for n, seconds in zip(PASS_TOKENS, full, strict=True)]
    rows.append(_row("speed over full width if every draft were kept", [f"{ratio:.2f}" for ratio in best]))
    return rows


def _row(title: str, cells: list[str]) -> str:
    return f"| {title} | {' | '.join(cells)} |"


def _time_passes(model: Any) -> list[float]:
    """Returns the 10th percentile of the seconds of a pass over each number of tokens, taken in turns."""
    cache = begin_sequence(model)
    assert cache is not None
    run_tokens(model, cache, torch.full((1, 20), 5), wanted=1)
    measured: dict[int, list[float]] = {count: [] for count in PASS_TOKENS}
    for _ in range(SAMPLES):
        for count in PASS_TOKENS:
            started = time.perf_counter()
            run_tokens(model, cache, torch.full((1, count), 7), wanted=count)
            measured[count].append(time.perf_counter() - started)
            cache.crop(-count)
    return [float(np.percentile(times, 10)) for times in measured.values()]


def _way_rows(ways: list[Way]) -> list[str]:
    full = ways[0]
    rows = ["| way | tokens/s | over full width | drafts kept | tokens a verification | text of the full width |"]
    rows.append("|---|---|---|---|---|---|")
    for way in ways:
        kept, tokens = "", ""
        if way.counts:
            accepted, drafted, passes = (
                sum(getattr(c, field) for c in way.counts.values()) for field in ("accepted", "drafted", "passes")
            )
            kept, tokens = f"{accepted / drafted:.2f}", f"{1 + accepted / passes:.2f}"
        same = sum(way.texts[number] == text for number, text in full.texts.items())
        speed = way.tokens_per_s
        ratio = speed / full.tokens_per_s
        rows.append(
            f"| {way.title} | {speed:.0f} | {ratio:.2f} | {kept} | {tokens} | {same} of {len(full.texts)} prompts |"
        )
    return rows


def _describe(options: argparse.Namespace) -> list[str]:
    return [
        "# Two widths of one set of weights, and drafts",
        "",
        f"Made by `python benchmarks/bench_draft.py`. Machine: {describe_machine(('torch', 'transformers'))}, one "
        f"thread. SmolLM2-135M, all weights in the stated format; {options.prompts} prompts of {PROMPT_TOKENS} tokens "
        f"of held-out text, {NEW_TOKENS} new tokens each, the fastest of {options.rounds} runs of each prompt, all "
        f"ways in turns, tokens behind the first. *K drafted*: K tokens at the low width, then one pass at the full "
        f"width over K + 1 tokens. KL on {KL_SEQUENCES} held-out sequences, nats per token.",
    ]


if __name__ == "__main__":
    main()
