"""Small pieces of HTML for notebooks: escaped, without scripts, in the notebook's own colours. Nothing is imported."""

import math
from collections.abc import Sequence
from html import escape

MOST_ROWS = 60


def html_heading(text: str, *lines: str) -> str:
    """Returns a heading and lines below it."""
    return f"<p><strong>{escape(text)}</strong>" + "".join(f"<br>{escape(line)}" for line in lines) + "</p>"


def html_table(
    headers: Sequence[str], rows: Sequence[Sequence[object]], *, shades: Sequence[Sequence[float]] = ()
) -> str:
    """Returns a table, cut after ``MOST_ROWS`` rows.

    Args:
        headers: Of the columns.
        rows: Cells; numbers are written with four digits.
        shades: [rows, columns - 1] how strongly the cells after the first are tinted, 0 to 1; empty for no tint.
    """
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = []
    for i, row in enumerate(rows[:MOST_ROWS]):
        cells = [f"<th>{escape(_text(row[0]))}</th>"]
        for j, value in enumerate(row[1:]):
            # A tint of the background leaves the notebook's own text colour readable, light or dark.
            style = f' style="background: rgba(70, 120, 220, {shades[i][j]:.2f})"' if shades else ""
            cells.append(f"<td{style}>{escape(_text(value))}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    left = len(rows) - MOST_ROWS
    more = f"<p>{left} more rows.</p>" if left > 0 else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>{more}"


def bits_shade(bits: float) -> float:
    """Returns how strongly a number of bits is tinted: 0.1 at 2 bits and below, 0.7 at 16 and above."""
    return 0.1 + 0.6 * min(max(math.log2(max(bits, 1) / 2) / 3, 0.0), 1.0)


def _text(value: object) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return "–" if value is None else str(value)
