"""One page about several reports: a table that sorts, with a link to each, and the same as CSV."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from reports import wording
from reports.atomic_files import write_atomically
from reports.csv_files import csv_text
from reports.html import render_page
from reports.summary import Summary, load_summary
from reports.wording import number

PAGE_FILE, CSV_FILE, REPORT_FILE = "index.html", "index.csv", "report.html"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of the table: what is read, and the number it is sorted by (None: by its text)."""

    text: str
    value: float | None = None
    link: str | None = None


HEADERS = (
    "Report",
    "Model",
    "Budget",
    "Size (MiB)",
    "Of the reference (%)",
    "Bits per weight",
    "KL",
    "Interval",
    "Times less than uniform",
    "Perplexity",
    "Gap (%)",
    "Made",
)


def write_index(directories: Sequence[Path | str], out: Path | str) -> Path:
    """Writes index.html and index.csv about the reports in some directories.

    Args:
        directories: directories that 'bitplan report' wrote.
        out: directory of the index; its links are relative, so that all can move together.

    Returns:
        The page's path.

    Raises:
        ValueError: if there is no directory, or one holds no report.
    """
    if not directories:
        msg = "an index must have reports: got no directory. Name those that 'bitplan report' wrote."
        raise ValueError(msg)
    target = Path(out)
    summaries = [(Path(directory), load_summary(directory)) for directory in directories]
    rows = [_row(directory, summary, _link(directory, target)) for directory, summary in summaries]
    table = pd.DataFrame([_record(directory, summary) for directory, summary in summaries])
    page = render_page(
        "index.html.j2",
        (),
        title=f"{wording.count(len(rows), 'plan')} of {wording.count(_count_models(summaries), 'model')}",
        headers=HEADERS,
        numeric=tuple(cell.value is not None for cell in rows[0]),
        rows=rows,
        csv_file=CSV_FILE,
    )
    write_atomically(target / CSV_FILE, csv_text(table))
    write_atomically(target / PAGE_FILE, page)
    return target / PAGE_FILE


def _count_models(summaries: list[tuple[Path, Summary]]) -> int:
    return len({summary.provenance.get("model_fingerprint", summary.model_name) for _, summary in summaries})


def _link(directory: Path, target: Path) -> str:
    relative = os.path.relpath(directory.resolve() / REPORT_FILE, target.resolve())
    # A folder's name may hold anything: as a part of a path it is quoted, a colon too, so that it names no scheme.
    return quote(Path(relative).as_posix(), errors="surrogateescape")


def _times_less(summary: Summary) -> float:
    uniform, measured = summary.headline.best_uniform_kl, summary.headline.measured_kl
    return uniform / measured if uniform is not None and uniform > 0 and measured > 0 else math.nan


def _row(directory: Path, summary: Summary, link: str) -> tuple[Cell, ...]:
    headline = summary.headline
    share = 100 * headline.memory_bytes / headline.reference_memory_bytes
    interval = wording.interval(headline.measured_kl_low, headline.measured_kl_high)
    return (
        Cell(text=directory.resolve().name, link=link),
        Cell(text=summary.model_name),
        Cell(text=headline.budget_text),
        _number(headline.memory_bytes / 2**20),
        _number(share),
        _number(headline.bits_per_weight),
        _number(headline.measured_kl),
        Cell(text=interval, value=headline.measured_kl_high - headline.measured_kl_low),
        _number(_times_less(summary)),
        _number(headline.perplexity),
        _number(100 * headline.relative_gap),
        Cell(text=summary.provenance.get("created", "")),
    )


def _number(value: float) -> Cell:
    return Cell(text=number(value), value=value)


def _record(directory: Path, summary: Summary) -> dict[str, object]:
    headline = summary.headline
    return {
        "model": summary.model_name,
        "plan": headline.shipped_plan_name,
        "budget": headline.budget_text,
        "memory_bytes": headline.memory_bytes,
        "reference_memory_bytes": headline.reference_memory_bytes,
        "bits_per_weight": headline.bits_per_weight,
        "measured_kl": headline.measured_kl,
        "kl_low": headline.measured_kl_low,
        "kl_high": headline.measured_kl_high,
        "best_uniform": headline.best_uniform_name,
        "best_uniform_kl": headline.best_uniform_kl,
        "perplexity": headline.perplexity,
        "relative_gap": headline.relative_gap,
        "created": summary.provenance.get("created", ""),
        "directory": str(directory),
    }
