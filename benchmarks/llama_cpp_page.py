"""The page of ``bench_llama_cpp.py``: what was measured, and its tables."""

from dataclasses import dataclass

from llama_cpp_tools import CONTEXT_TOKENS
from machine import describe_machine

Kl = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A mix of llama.cpp's of the model as it was trained, and the plan of its size.

    Args:
        rival: KL of the mix: nats per token, and its standard error.
        plan_bytes: Bytes of the plan's file.
        predicted: KL that the plan predicted.
        plan: KL of the plan, as of the rival.
    """

    rival: Kl
    plan_bytes: int
    predicted: float
    plan: Kl


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mix.

    Args:
        mix: llama.cpp's name of it.
        rival_bytes: Bytes of its file.
        textless: Without an importance matrix.
        textual: With one.
        equalized: KL of the mix made of the equalized file, without an importance matrix.
        weighted: The same with an importance matrix of drawn tokens.
    """

    mix: str
    rival_bytes: int
    textless: Comparison
    textual: Comparison
    equalized: Kl
    weighted: Kl


def render(rows: list[Row], arguments: str, chunks: int, rule: str, rewritten: Kl) -> str:
    """Returns the page.

    Args:
        rows: The mixes.
        arguments: Of the script, as they were given.
        chunks: Pieces of text that each KL is measured on.
        rule: What a plan's codes are made by where there is a matrix.
        rewritten: KL of the unquantized file of the equalized model.
    """
    rows = sorted(rows, key=lambda row: row.rival_bytes)
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
        "## Without an importance matrix",
        "",
        "No side has read a text for its scales and codes; the plan's allocation has (the Fisher metric). Its channels "
        "are equalized, and the squares of its rounding errors weighted, by what they carry when tokens drawn evenly "
        "from the vocabulary pass through the model: `--transform equalize --quantizer drawn_clipping`.",
        "",
        *_main_table([(row, row.textless) for row in rows]),
        "",
        "How much of this is the rescaling, how much the weighting, how much the allocation: llama.cpp's mix of the "
        "equalized file, the same with an importance matrix of the drawn tokens, and the plan beside that. The model "
        "is a random rescaling of trained weights (sigma 0.15), a part of which equalization undoes. The unquantized "
        f"equalized file has a KL of {rewritten[0]:.0e}, which is rounding to float16.",
        "",
        "| size of | llama.cpp | equalized | and drawn tokens' importance | plan | × the last |",
        "|---" * 6 + "|",
        *(_shared_line(row) for row in rows),
        "",
        "## With an importance matrix",
        "",
        "Both sides have seen the same calibration text: llama.cpp by the importance matrix that bitplan wrote from "
        f"it, the plan by what the rule '{rule}' reads of it, on the model equalized as above.",
        "",
        *_main_table([(row, row.textual) for row in rows]),
    ]
    return "\n".join(lines) + "\n"


def _main_table(rows: list[tuple[Row, Comparison]]) -> list[str]:
    lines = ["| size of | bytes | llama.cpp | plan's bytes | predicted | plan | × llama.cpp |", "|---" * 7 + "|"]
    for row, found in rows:
        cells = [row.mix, f"{row.rival_bytes:,}", _cell(found.rival), f"{found.plan_bytes:,}", f"{found.predicted:.4f}"]
        lines.append(f"| {' | '.join([*cells, _cell(found.plan)])} | **{found.plan[0] / found.rival[0]:.2f}** |")
    return lines


def _shared_line(row: Row) -> str:
    cells = [row.mix, *map(_cell, (row.textless.rival, row.equalized, row.weighted, row.textless.plan))]
    return f"| {' | '.join(cells)} | **{row.textless.plan[0] / row.weighted[0]:.2f}** |"


def _cell(kl: Kl) -> str:
    return f"{kl[0]:.4f} ± {kl[1]:.4f}"
