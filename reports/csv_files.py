"""The report's tables as CSV files.

A spreadsheet runs a cell that starts with = + - @ (or their full-width forms) or a tab as a formula. Such text gets a
leading apostrophe; numbers stay numbers.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from reports.atomic_files import write_atomically
from reports.report import COLUMNS, OPTIONAL_TABLES, Report

_STARTS_A_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


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


def named_tables(report: Report) -> dict[str, pd.DataFrame]:
    """The report's tables by the names of their files; those that a report need not have only with rows."""
    found = {name: getattr(report, name) for name in COLUMNS}
    kept = {name: table for name, table in found.items() if len(table) or name not in OPTIONAL_TABLES}
    return kept | {"provenance": provenance_table(report)}


def write_csv(report: Report, directory: Path | str) -> tuple[Path, ...]:
    """Writes one CSV file for each table of the report, each of them atomically.

    Returns:
        The paths: plan.csv, frontier.csv, evaluations.csv, sensitivities.csv, provenance.csv, and for a mixture of
        experts or under rules experts.csv, affinity.csv, rule_prices.csv.
    """
    paths = []
    for name, table in named_tables(report).items():
        path = Path(directory) / f"{name}.csv"
        write_atomically(path, csv_text(table))
        paths.append(path)
    return tuple(paths)
