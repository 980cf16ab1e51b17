"""The page of ``bench_llama_cpp.py``: what was measured, and its tables."""

from dataclasses import dataclass

from llama_cpp_tools import CONTEXT_TOKENS
from machine import describe_machine

Kl = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The rivals of one mix and the plan of their size, one kind of knowledge about inputs on all sides.

    Args:
        rival: KL of llama.cpp's mix of the model as it was trained: nats per token, and its standard error.
        transformed: The same of the file that the plan is made on.
        weighted: The same with an importance matrix of what the plan's codes are weighted by; None where that is the
            same file.
        plan_bytes: Bytes of the plan's file.
        predicted: KL that the plan predicted.
        plan: KL of the plan, as of the rivals.
    """

    rival: Kl
    transformed: Kl
    weighted: Kl | None
    plan_bytes: int
    predicted: float
    plan: Kl


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mix.

    Args:
        mix: llama.cpp's name of it.
        rival_bytes: Bytes of its file.
        textless: What is known without a text.
        textual: What is known from one.
    """

    mix: str
    rival_bytes: int
    textless: Comparison
    textual: Comparison


def render(rows: list[Row], arguments: str, chunks: int, rewritten: dict[str, Kl]) -> str:
    """Returns the page.

    Args:
        rows: The mixes.
        arguments: Of the script, as they were given.
        chunks: Pieces of text that each KL is measured on.
        rewritten: Transform -> KL of the unquantized file of the model that it rewrote.
    """
    rows = sorted(rows, key=lambda row: row.rival_bytes)
    kept = ", ".join(f"{name} {kl[0]:.1e} ± {kl[1]:.0e}" for name, kl in rewritten.items())
    lines = [
        "# Plans for llama.cpp beside its own mixes, SmolLM2-135M",
        "",
        f"Made by `python benchmarks/bench_llama_cpp.py {arguments}`. Machine: {describe_machine()}.",
        "",
        "Mean KL to the unquantized model, nats per token ± its standard error, measured by llama-perplexity on "
        f"{chunks} pieces of {CONTEXT_TOKENS} tokens of the Python reference, which nothing else saw. "
        "The files of llama.cpp are llama-quantize's. No plan is larger than its rival, and each file is as long as "
        "its plan predicted, to the byte.",
        "",
        "Plans are made on a model whose channels are rescaled first, its function unchanged (KL of the unquantized "
        f"files to that of the model as it was: {kept}). The model of this table is a random rescaling of trained "
        "weights (sigma 0.15), and a part of what such a transform gains here is that it undoes that: hence "
        "llama.cpp's own mixes of the rewritten files in the second table of each section.",
        "",
        "## Without an importance matrix",
        "",
        "No side has read a text for its codes; the plan's allocation has (the Fisher metric). Its channels are "
        "equalized, and the squares of its rounding errors weighted, by what they carry when tokens drawn evenly from "
        "the vocabulary pass through the model (`--transform equalize --quantizer drawn_clipping`).",
        "",
        *_main_table([(row, row.textless) for row in rows]),
        "",
        "How much of it is the rescaling, how much the weighting and how much the allocation: llama.cpp's mix of the "
        "equalized file, then with an importance matrix of the same drawn tokens, and the plan beside the last.",
        "",
        *_shared_table([(row, row.textless) for row in rows], ("equalized", "and importance of drawn tokens")),
        "",
        "## With an importance matrix",
        "",
        "All sides have read the same calibration text: llama.cpp by the importance matrix that bitplan wrote from it, "
        "the plan by its transform and its rule for the codes.",
        "",
        *_main_table([(row, row.textual) for row in rows]),
        "",
        "llama.cpp's mix of the rewritten file, with the importance matrix of that:",
        "",
        *_shared_table([(row, row.textual) for row in rows], ("rewritten, its importance matrix",)),
    ]
    return "\n".join(lines) + "\n"


def _main_table(rows: list[tuple[Row, Comparison]]) -> list[str]:
    lines = ["| size of | bytes | llama.cpp | plan's bytes | predicted | plan | × llama.cpp |", "|---" * 7 + "|"]
    for row, found in rows:
        cells = [row.mix, f"{row.rival_bytes:,}", _cell(found.rival), f"{found.plan_bytes:,}", f"{found.predicted:.4f}"]
        lines.append(f"| {' | '.join([*cells, _cell(found.plan)])} | **{found.plan[0] / found.rival[0]:.2f}** |")
    return lines


def _shared_table(rows: list[tuple[Row, Comparison]], names: tuple[str, ...]) -> list[str]:
    lines = [f"| size of | llama.cpp | {' | '.join(names)} | plan | × the last |", "|---" * (4 + len(names)) + "|"]
    for row, found in rows:
        shared = [kl for kl in (found.transformed, found.weighted) if kl is not None]
        cells = [row.mix, *map(_cell, [found.rival, *shared, found.plan])]
        lines.append(f"| {' | '.join(cells)} | **{found.plan[0] / shared[-1][0]:.2f}** |")
    return lines


def _cell(kl: Kl) -> str:
    return f"{kl[0]:.4f} ± {kl[1]:.4f}"
