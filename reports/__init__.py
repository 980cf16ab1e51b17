"""What a person is shown: one self-contained HTML page, the files behind it, and pages about several of them.

    Report, Headline     the artefact: a few headline numbers and tables, checked once
    write_html           Report -> one HTML file that opens from disk, with no network
    write_csv            Report -> plan.csv, frontier.csv, evaluations.csv, sensitivities.csv, provenance.csv
    write_parquet        the same tables as Parquet files (needs pyarrow)
    write_pdf            Report -> one page of PDF (needs an installed Chromium)
    write_summary        Report -> summary.json, by which an index of reports knows it
    reports.tables       what each chart shows, as pandas tables
    reports.charts       the charts, as plotly figures

Names are loaded when first used: importing `reports` loads neither pandas nor plotly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reports.csv_files import write_csv
    from reports.html import write_html
    from reports.parquet_files import write_parquet
    from reports.pdf import write_pdf
    from reports.report import Calibration, Headline, Report
    from reports.summary import write_summary

__all__ = [
    "Calibration",
    "Headline",
    "Report",
    "write_csv",
    "write_html",
    "write_parquet",
    "write_pdf",
    "write_summary",
]

_HOME = {
    "Calibration": "reports.report",
    "Headline": "reports.report",
    "Report": "reports.report",
    "write_csv": "reports.csv_files",
    "write_html": "reports.html",
    "write_parquet": "reports.parquet_files",
    "write_pdf": "reports.pdf",
    "write_summary": "reports.summary",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        msg = f"module 'reports' has no attribute {name!r}. It has {', '.join(__all__)}."
        raise AttributeError(msg)
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
