"""The report's tables as Parquet files, for who goes on computing with them.

Needs pyarrow (`pip install 'bitplan[parquet]'`). Text stays as it is: nothing that reads Parquet runs a cell.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd

from reports.atomic_files import write_bytes_atomically
from reports.csv_files import named_tables
from reports.report import Report


def import_pyarrow() -> Any:
    """Returns the module `pyarrow`.

    Raises:
        ModuleNotFoundError: if it is not installed; the message says what to install.
    """
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        msg = "Parquet files need pyarrow: it is not installed. Run: pip install 'bitplan[parquet]'."
        raise ModuleNotFoundError(msg) from error
    return pyarrow


def write_parquet(report: Report, directory: Path | str) -> tuple[Path, ...]:
    """Writes one Parquet file for each table of the report, each of them atomically.

    Returns:
        The paths, named as those of `write_csv`.
    """
    import_pyarrow()
    paths = []
    for name, table in named_tables(report).items():
        path = Path(directory) / f"{name}.parquet"
        buffer = io.BytesIO()
        _readable(table).to_parquet(buffer, engine="pyarrow", index=False)
        write_bytes_atomically(path, buffer.getvalue())
        paths.append(path)
    return tuple(paths)


def _readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table with text that is valid Unicode: a path may hold stray bytes."""
    columns = {
        name: column if pd.api.types.is_numeric_dtype(column) else [_unicode(value) for value in column]
        for name, column in table.items()
    }
    return pd.DataFrame(columns)


def _unicode(value: object) -> object:
    return value.encode("utf-8", errors="backslashreplace").decode() if isinstance(value, str) else value
