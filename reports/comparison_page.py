"""The page about two plans of one model, and its CSV files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from reports import comparison_charts, comparison_tables, wording
from reports.atomic_files import write_atomically
from reports.comparison import Comparison, Side
from reports.comparison_tables import EITHER, FIRST, SAME, SECOND
from reports.csv_files import csv_text
from reports.html import render_page
from reports.page_parts import Section, make_chart, make_download, make_listing
from reports.palettes import NAMED
from reports.wording import number, percent, size

PAGE_FILE = "comparison.html"


def verdict(comparison: Comparison) -> str:
    """Which plan is smaller and which loses less, as measured where it was, in one or two sentences."""
    first, second = comparison.first, comparison.second
    change = second.memory_bytes - first.memory_bytes
    if change == 0:
        sizes = "Both are of the same size."
    else:
        smaller, larger = (first, second) if change > 0 else (second, first)
        share = abs(change) / larger.memory_bytes
        sizes = f"{smaller.name} is smaller by {size(abs(change))} ({percent(share)})."
    return f"{_quality_sentence(first, second)} {sizes}"


def _quality_sentence(first: Side, second: Side) -> str:
    kind, losses = "measured", (first.measured_kl, second.measured_kl)
    if None in losses:
        kind, losses = "predicted", (first.predicted_kl, second.predicted_kl)
    if losses[0] is None or losses[1] is None:
        return "The losses of the two are not known in the same unit."
    low, high = min(losses[0], losses[1]), max(losses[0], losses[1])
    better, worse = (first, second) if losses[0] <= losses[1] else (second, first)
    if kind == "measured" and _intervals_overlap(better, worse):
        return (
            f"As measured, the two cannot be told apart: {better.name} loses {number(low)}, {worse.name} "
            f"{number(high)} nats per token, and their intervals overlap."
        )
    times = f", {number(high / low, 2)} times less" if low > 0 and high > low else ""
    return f"{better.name} loses {number(low)} nats per token ({kind}){times} than {worse.name} with {number(high)}."


def _intervals_overlap(better: Side, worse: Side) -> bool:
    if better.measured_kl_high is None or worse.measured_kl_low is None:
        return False
    return better.measured_kl_high >= worse.measured_kl_low


def build_comparison_sections(comparison: Comparison) -> tuple[Section, ...]:
    """The sections of the page: one frontier, where bits differ, roles, units."""
    return (
        _frontier_section(comparison),
        _change_section(comparison),
        _role_section(comparison),
        _unit_section(comparison),
    )


def _frontier_section(comparison: Comparison) -> Section:
    sides = (comparison.first, comparison.second)
    table = pd.DataFrame(
        {
            "plan": [side.name for side in sides],
            "budget": [side.budget_text for side in sides],
            "memory_mib": [side.memory_bytes / 2**20 for side in sides],
            "bits_per_weight": [side.bits_per_weight for side in sides],
            "predicted_kl": pd.Series([side.predicted_kl for side in sides], dtype="float64"),
            "measured_kl": pd.Series([side.measured_kl for side in sides], dtype="float64"),
            "interval": [wording.interval(side.measured_kl_low, side.measured_kl_high) for side in sides],
        }
    )
    headers = {
        "plan": "Plan",
        "budget": "Budget",
        "memory_mib": "Size (MiB)",
        "bits_per_weight": "Bits per weight",
        "predicted_kl": "Predicted KL",
        "measured_kl": "Measured KL",
        "interval": "Interval",
    }
    measured = (
        "The two were not measured on one text, so their predictions are compared."
        if comparison.measured_on is None
        else f"Both were measured on {comparison.measured_on}."
    )
    return Section(
        key="both",
        title="Both on one frontier",
        paragraphs=(
            f"Open symbols are predictions, full ones measurements. Further left is smaller, further down is better. "
            f"{measured}",
        ),
        charts=(
            make_chart(
                "both",
                "Loss against size of both plans; the table below has the numbers.",
                lambda narrow: comparison_charts.both_figure(comparison, NAMED, narrow=narrow),
            ),
        ),
        listing=make_listing("Both plans", table, headers),
        open_listing=True,
    )


def _change_section(comparison: Comparison) -> Section:
    grid = comparison_tables.change_grid(comparison.parts)
    headers = {
        "layer_index": "Layer",
        "role": "Role",
        "first_formats": comparison.first.name,
        "second_formats": comparison.second.name,
        "bits_change": "Change of bits per weight",
    }
    return Section(
        key="changes",
        title="Where their bits differ",
        paragraphs=(
            f"Blue cells are stored in more bits by {comparison.second.name}, orange ones by {comparison.first.name}; "
            "cells without colour are the same in both.",
        ),
        charts=(
            make_chart(
                "changes",
                f"Change of bits in {wording.count(len(grid), 'cell')} of layers and roles; see the table below.",
                lambda narrow: comparison_charts.change_figure(grid, NAMED, narrow=narrow),
            ),
        )
        if len(grid)
        else (),
        listing=make_listing("Formats of both, by layer and role", grid, headers),
    )


def _role_section(comparison: Comparison) -> Section:
    by_role = comparison_tables.role_comparison(comparison.parts)
    first, second = comparison.first.name, comparison.second.name
    words = {SAME: "the same", FIRST: first, SECOND: second, EITHER: "one is smaller, the other loses less"}
    shown = by_role.assign(
        first_mib=by_role["first_bytes"] / 2**20,
        second_mib=by_role["second_bytes"] / 2**20,
        words=[words[better] for better in by_role["better"]],
    )
    headers = {
        "role": "Role",
        "units": "Units",
        "differing": "That differ",
        "first_mib": f"{first} (MiB)",
        "second_mib": f"{second} (MiB)",
        "first_loss": f"{first}, loss",
        "second_loss": f"{second}, loss",
        "words": "Better",
    }

    def draw(what: str, narrow: bool) -> go.Figure:
        return comparison_charts.role_figure(by_role, comparison, what, NAMED, narrow=narrow)

    return Section(
        key="roles",
        title="Which is better where",
        paragraphs=(
            "For each role, the bytes that the two plans spend and the loss that is predicted from it, by the same "
            "metric for both. A plan is better in a role where it is no larger and loses no more.",
        ),
        charts=(
            make_chart("role-bytes", "Bytes of each role in both plans; see the table.", lambda n: draw("bytes", n)),
            make_chart("role-loss", "Loss of each role in both plans; see the table.", lambda n: draw("loss", n)),
        ),
        listing=make_listing("Bytes and losses by role", shown, headers),
        open_listing=True,
        download=make_download("roles.csv", by_role),
    )


def _unit_section(comparison: Comparison) -> Section:
    table = comparison_tables.differing_parts(comparison.parts)
    headers = {
        "unit": "Unit",
        "first_format": comparison.first.name,
        "second_format": comparison.second.name,
        "bytes_change": "Change of bytes",
        "loss_change": "Change of loss",
    }
    differing = f"{wording.count(len(table), 'unit')} of {len(comparison.parts):,}"
    return Section(
        key="units",
        title="Units that differ",
        paragraphs=(f"{differing} have another format. Those whose predicted losses differ most come first.",),
        listing=make_listing("Units whose formats differ", table, headers),
        open_listing=True,
        download=make_download("units.csv", comparison.parts),
    )


def render_comparison(comparison: Comparison) -> str:
    """The whole page as text."""
    return render_page(
        "comparison.html.j2",
        build_comparison_sections(comparison),
        title=comparison.title,
        comparison=comparison,
        sides=(comparison.first, comparison.second),
        verdict=verdict(comparison),
        further_links=(),
    )


def write_comparison(comparison: Comparison, directory: Path | str) -> Path:
    """Writes comparison.html, units.csv, roles.csv and frontier.csv, each atomically, and returns the page's path."""
    folder = Path(directory)
    tables = {
        "units": comparison.parts,
        "roles": comparison_tables.role_comparison(comparison.parts),
        "frontier": comparison.frontier,
    }
    for name, table in tables.items():
        write_atomically(folder / f"{name}.csv", csv_text(table))
    write_atomically(folder / PAGE_FILE, render_comparison(comparison))
    return folder / PAGE_FILE
