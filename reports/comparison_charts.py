"""Draws two plans side by side: where their bits differ, their bytes and losses by role, both on one frontier."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from reports.chart_style import (
    apply_style_,
    colour_bar,
    drawable,
    drawable_on_log,
    error_bars,
    log_axis,
    safe_label,
    title_bar_,
)
from reports.comparison import Comparison, Side
from reports.palettes import LIGHT, Palette
from reports.wording import number, size

CHANGE = "bits per weight, second minus first"


def change_figure(grid: pd.DataFrame, palette: Palette = LIGHT, *, narrow: bool = False) -> go.Figure:
    """Heat map of layers and roles: where the second plan stores more bits than the first, and where fewer.

    Takes `comparison_tables.change_grid`.
    """
    layers, roles = sorted(set(grid["layer_index"])), list(dict.fromkeys(grid["role"]))
    cells = {(row["role"], row["layer_index"]): row for row in grid.to_dict("records")}

    def matrix(make: Any, nothing: str | None = None) -> list[list[Any]]:
        rows = [[make(cells[r, n]) if (r, n) in cells else nothing for n in layers] for r in roles]
        return [list(column) for column in zip(*rows, strict=True)] if narrow else rows

    labels = [safe_label(role) for role in roles]
    most = max(1.0, float(grid["bits_change"].abs().max())) if len(grid) else 1.0
    figure = go.Figure(
        go.Heatmap(
            x=labels if narrow else layers,
            y=layers if narrow else labels,
            z=matrix(lambda row: row["bits_change"]),
            customdata=matrix(_tell_change),
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=False,
            coloraxis="coloraxis",
            xgap=2,
            ygap=2,
        )
    )
    scale = [[0, palette.contrast], [0.5, palette.page], [1, palette.accent]]
    bar = colour_bar(CHANGE, palette, narrow)
    figure.update_layout(coloraxis={"colorscale": scale, "cmin": -most, "cmax": most, "colorbar": bar})
    height = (18 * len(layers) + 200) if narrow else max(36 * len(roles), 150) + 60
    apply_style_(figure, palette, height=height, narrow=narrow, legend=False)
    if narrow:
        title_bar_(figure, CHANGE, palette)
    figure.update_xaxes(showgrid=False, showline=False, tickangle=-50 if narrow else 0)
    figure.update_yaxes(showgrid=False, showline=False, autorange="reversed")
    if narrow:
        figure.update_xaxes(side="top", type="category")
    elif layers:
        figure.update_xaxes(title_text="layer", dtick=-(-len(layers) // 32), tick0=layers[0])
    return figure


def _tell_change(row: Mapping[Any, Any]) -> str:
    return (
        f"<b>layer {row['layer_index']} {safe_label(row['role'])}</b><br>"
        f"{safe_label(row['first_formats'])} → {safe_label(row['second_formats'])}<br>"
        f"{row['differing']} of {row['units']} units differ"
    )


def role_figure(
    by_role: pd.DataFrame, comparison: Comparison, what: str, palette: Palette = LIGHT, *, narrow: bool = False
) -> go.Figure:
    """Two bars for each role, one for each plan. Takes `comparison_tables.role_comparison`.

    Args:
        by_role: the roles.
        comparison: names the plans.
        what: 'bytes' or 'loss'.
    """
    figure = go.Figure()
    sides = (("first", comparison.first, palette.accent), ("second", comparison.second, palette.contrast))
    for key, side, colour in sides:
        values = by_role[f"{key}_{what}"] / (2**20 if what == "bytes" else 1)
        figure.add_bar(
            y=[safe_label(role) for role in by_role["role"]],
            x=drawable(values),
            orientation="h",
            name=safe_label(side.name),
            marker={"color": colour},
            customdata=[
                f"<b>{safe_label(role)}</b>, {safe_label(side.name)}<br>"
                + (size(value * 2**20) if what == "bytes" else f"loss {number(value)}")
                for role, value in zip(by_role["role"], values, strict=True)
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
    apply_style_(figure, palette, height=44 * len(by_role) + 130, narrow=narrow)
    title = "size (MiB)" if what == "bytes" else f"predicted loss ({comparison.loss_unit})"
    figure.update_layout(barmode="group", bargap=0.3)
    figure.update_xaxes(title_text=title, rangemode="tozero", nticks=5 if narrow else 10)
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    return figure


def both_figure(comparison: Comparison, palette: Palette = LIGHT, *, narrow: bool = False) -> go.Figure:
    """The frontier with both plans: predicted as open symbols, measured as full ones."""
    curve = comparison.frontier.sort_values("memory_bytes", kind="stable")
    figure = go.Figure()
    if len(curve):
        figure.add_scatter(
            x=drawable(curve["memory_bytes"] / 2**20),
            y=drawable_on_log(curve["predicted_loss"]),
            mode="lines",
            line={"color": palette.muted, "width": 2},
            name="Best plans found, predicted",
            hoverinfo="skip",
        )
    sides = ((comparison.first, palette.accent, "diamond"), (comparison.second, palette.contrast, "square"))
    for side, colour, symbol in sides:
        figure.add_traces(_side_traces(side, colour, symbol))
    known = [kl for side, _, _ in sides for kl in (side.predicted_kl, side.measured_kl) if kl is not None and kl > 0]
    sizes = [side.memory_bytes / 2**20 for side, _, _ in sides]
    margin = max(0.6 * (max(sizes) - min(sizes)), 0.1 * max(sizes))
    figure.update_xaxes(title_text="size in memory (MiB)", range=[min(sizes) - margin, max(sizes) + margin])
    figure.update_yaxes(**log_axis("loss (nats per token)", known))
    if known:
        figure.update_yaxes(range=[math.log10(min(known) / 3), math.log10(max(known) * 3)])
    return apply_style_(figure, palette, height=420, narrow=narrow)


def _side_traces(side: Side, colour: str, symbol: str) -> list[go.Scatter]:
    x = [side.memory_bytes / 2**20]
    found = (("predicted", side.predicted_kl, f"{symbol}-open"), ("measured", side.measured_kl, symbol))
    traces = []
    for kind, kl, shape in found:
        if kl is None or not kl > 0:
            continue
        bars = {}
        if kind == "measured" and side.measured_kl_low is not None and side.measured_kl_high is not None:
            low, high = pd.Series([side.measured_kl_low]), pd.Series([side.measured_kl_high])
            bars = {"error_y": error_bars(pd.Series([kl]), low, high, colour)}
        traces.append(
            go.Scatter(
                x=x,
                y=[kl],
                mode="markers",
                name=f"{safe_label(side.name)}, {kind}",
                marker={"color": colour, "symbol": shape, "size": 13},
                hovertemplate=f"<b>{safe_label(side.name)}</b><br>{kind} KL {number(kl)}<extra></extra>",
                **bars,
            )
        )
    return traces
