"""What a section of the page is made of, as plain values: charts, menus, tables, downloads."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from reports.csv_files import csv_text
from reports.wording import number

# Longer tables are cut in the page; the CSV has all rows.
MOST_ROWS_SHOWN = 250
# Larger CSV files are not put into the page.
MOST_CSV_BYTES = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure in both shapes, and in a sentence for those who cannot see it."""

    key: str
    alternative: str
    wide: go.Figure
    narrow: go.Figure


@dataclass(frozen=True, kw_only=True)
class Menu:
    """A choice of what the section's charts show: traces whose meta[axis] is the chosen value."""

    axis: str
    label: str
    options: tuple[tuple[str, str], ...]
    selected: str


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A table of ready text. `numeric` says which columns are aligned as numbers."""

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]
    rows_left_out: int = 0
    marked_row: int | None = None


@dataclass(frozen=True, kw_only=True)
class Download:
    """A CSV file inside the page; `href` is None where it would be too large."""

    file_name: str
    rows: int
    href: str | None


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page."""

    key: str
    title: str
    paragraphs: tuple[str, ...]
    charts: tuple[Chart, ...] = ()
    menus: tuple[Menu, ...] = ()
    listing: Listing | None = None
    open_listing: bool = False
    download: Download | None = None


def make_chart(key: str, alternative: str, draw: Callable[[bool], go.Figure]) -> Chart:
    """Both shapes of a chart; `draw` takes whether the place is narrow."""
    return Chart(key=key, alternative=alternative, wide=draw(False), narrow=draw(True))


def make_download(file_name: str, table: pd.DataFrame) -> Download:
    """The table as a CSV file inside the page, if it is not too large."""
    # A million rows are not worth turning into text only to find it too large.
    text = csv_text(table) if len(table) * 20 < MOST_CSV_BYTES else None
    href = None
    if text is not None and len(text) <= MOST_CSV_BYTES:
        encoded = base64.b64encode(text.encode("utf-8", errors="backslashreplace")).decode("ascii")
        href = f"data:text/csv;base64,{encoded}"
    return Download(file_name=file_name, rows=len(table), href=href)


def make_listing(caption: str, table: pd.DataFrame, headers: dict[str, str]) -> Listing:
    """The columns named in `headers` as text, cut at `MOST_ROWS_SHOWN` rows."""
    numeric = tuple(bool(pd.api.types.is_numeric_dtype(table[column])) for column in headers)
    whole = tuple(bool(pd.api.types.is_integer_dtype(table[column])) for column in headers)
    shown = table[list(headers)].head(MOST_ROWS_SHOWN)
    rows = tuple(
        tuple(_cell(value, is_number, is_whole) for value, is_number, is_whole in zip(row, numeric, whole, strict=True))
        for row in shown.itertuples(index=False, name=None)
    )
    return Listing(
        caption=caption,
        headers=tuple(headers.values()),
        rows=rows,
        numeric=numeric,
        rows_left_out=len(table) - len(shown),
    )


def _cell(value: Any, is_number: bool, is_whole: bool) -> str:
    if pd.isna(value):
        return "–"
    if is_whole:
        return f"{value:,}"
    return number(value) if is_number else str(value)


def make_format_listing(grid: pd.DataFrame, outside: pd.DataFrame) -> Listing:
    """Layers down, roles across, formats in the cells; units without a layer first."""
    roles = [str(role) for role in dict.fromkeys(grid["role"])]
    cells = {(row["layer_index"], row["role"]): str(row["formats"]) for row in grid.to_dict("records")}
    rows = [(str(row["unit"]), str(row["formats"]), *[""] * len(roles)) for row in outside.to_dict("records")]
    rows += [
        (f"layer {layer}", "", *[cells.get((layer, role), "–") for role in roles])
        for layer in sorted(set(grid["layer_index"]))
    ]
    if not len(outside):
        rows = [(row[0], *row[2:]) for row in rows]
    headers = ("Layer", *(["Outside the layers"] if len(outside) else []), *roles)
    return Listing(
        caption="The format of each part",
        headers=headers,
        rows=tuple(rows[:MOST_ROWS_SHOWN]),
        numeric=(False,) * len(headers),
        rows_left_out=max(0, len(rows) - MOST_ROWS_SHOWN),
    )
