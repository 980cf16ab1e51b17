"""The report's tables as CSV files.

A spreadsheet runs a cell that starts with = + - @ or a tab as a formula. Such text gets a leading
apostrophe; numbers stay numbers.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from reports.atomic_files import write_atomically
from reports.report import COLUMNS, Report

_STARTS_A_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def neutralise(value: object) -> object:
    """The value, or for text that a spreadsheet would run, the text behind an apostrophe."""
    # A spreadsheet may drop leading blanks, so they do not protect.
    if isinstance(value, str) and (value.startswith(_STARTS_A_FORMULA) or value.lstrip().startswith(_STARTS_A_FORMULA)):
        return "'" + value
    return value


def csv_text(table: pd.DataFrame) -> str:
    """The table as CSV (RFC 4180) with a header; missing values are empty, numbers keep their precision."""
    safe = {str(neutralise(str(name))): _safe_column(column) for name, column in table.items()}
    # With this line end, a stray carriage return inside a cell is quoted too.
    return pd.DataFrame(safe).to_csv(index=False, lineterminator="\r\n")


def _safe_column(column: pd.Series) -> pd.Series:
    if pd.api.types.is_numeric_dtype(column):
        return column
    return pd.Series([neutralise(value) for value in column], index=column.index, dtype=object)


def provenance_table(report: Report) -> pd.DataFrame:
    """The provenance as a table with the columns name and value."""
    # Of dtype object, because a path may hold bytes that are no text, which other dtypes refuse.
    return pd.DataFrame(list(report.provenance.items()), columns=["name", "value"], dtype=object)


def write_csv(report: Report, directory: Path | str) -> tuple[Path, ...]:
    """Writes one CSV file for each table of the report, each of them atomically.

    Returns:
        The paths: plan.csv, frontier.csv, evaluations.csv, sensitivities.csv, provenance.csv.
    """
    named = {name: getattr(report, name) for name in COLUMNS} | {"provenance": provenance_table(report)}
    paths = []
    for name, table in named.items():
        path = Path(directory) / f"{name}.csv"
        write_atomically(path, csv_text(table))
        paths.append(path)
    return tuple(paths)
