"""The report on one page of paper: what was found, the frontier, the heat map, the bytes of each role."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from reports import charts, tables, wording
from reports.browser import print_to_pdf
from reports.html import render_page
from reports.page_parts import Listing, Section, make_chart
from reports.palettes import NAMED
from reports.report import Report
from reports.wording import number

# Longer tables would push the charts off the page.
MOST_ROLES = 12
MOST_FORMATS = 4
FRONTIER_PX = 260


def build_one_page(report: Report) -> tuple[Section, ...]:
    """The sections that fit on one page."""
    curve, points = tables.frontier_curve(report.frontier), tables.measured_points(report.evaluations)
    grid, outside = tables.plan_grid(report.plan), tables.units_without_layer(report.plan)
    frontier = charts.frontier_figure(curve, points, NAMED)
    frontier.update_layout(height=FRONTIER_PX)
    heat_map = charts.plan_figure(grid, outside, NAMED)
    # Lower rows than on a screen: paper has no pointer to aim with.
    heat_map.update_layout(height=0.75 * heat_map.layout.height)
    return (
        _chart_section("frontier", "Loss against size", frontier),
        _chart_section("plan", "Bits of each part", heat_map),
        Section(key="roles", title="Bytes by role", paragraphs=(), listing=_role_listing(report), open_listing=True),
    )


def _chart_section(key: str, title: str, figure: go.Figure) -> Section:
    return Section(key=key, title=title, paragraphs=(), charts=(make_chart(key, title, lambda _: figure),))


def _role_listing(report: Report) -> Listing:
    roles = tables.role_totals(report.plan, most_formats=MOST_FORMATS)
    rows = tuple(
        (
            str(row["role"]),
            f"{row['units']:,}",
            wording.size(row["memory_bytes"]),
            wording.percent(row["share"]),
            number(row["bits_per_weight"]),
            str(row["formats"]),
        )
        for row in roles.head(MOST_ROLES).to_dict("records")
    )
    return Listing(
        caption="Bytes by role",
        headers=("Role", "Units", "Size", "Share", "Bits per weight", "Formats"),
        rows=rows,
        numeric=(False, True, True, True, True, False),
        rows_left_out=len(roles) - len(rows),
    )


def render_one_page(report: Report) -> str:
    """The page as HTML, which scales itself to one sheet of A4."""
    headline = report.headline
    return render_page(
        "one_page.html.j2",
        build_one_page(report),
        title=report.title,
        report=report,
        headline=headline,
        share=headline.memory_bytes / headline.reference_memory_bytes,
    )


def write_pdf(report: Report, path: Path | str) -> Path:
    """Writes the report as one page of PDF, printed by an installed Chromium.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: if no browser is installed.
        PrintingFailed: if the browser fails.
    """
    return print_to_pdf(render_one_page(report), Path(path))
