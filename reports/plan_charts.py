"""Draws the plan: a heat map of layers and roles, and the bytes of each role."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from reports import tables
from reports.chart_style import NARROW_BAR_PX, apply_style_, colour_bar, drawable, safe_label, title_bar_
from reports.palettes import LIGHT, SEQUENTIAL_STEPS, Palette, bits_colour, bits_position
from reports.wording import number, percent, size

LOW_CHART_PX = 230
BITS = "bits per weight"
# Above this many layers the numbers no longer fit into the cells of the wide heat map.
LAYERS_WITH_NUMBERS = 44


def bits_axis(palette: Palette, narrow: bool, height: int) -> dict[str, Any]:
    """The colour axis of bits per weight, logarithmic so that 16 bits do not swallow the rest.

    Args:
        palette: its colours.
        narrow: whether the bar lies above the chart.
        height: of the chart, px; a low one has room for few labels.
    """
    ticks = [2, 3, 4, 5, 6, 8, 12, 16] if narrow or height > LOW_CHART_PX else [2, 4, 8, 16]
    labels = {"tickvals": [bits_position(bits) for bits in ticks], "ticktext": [str(bits) for bits in ticks]}
    steps = [[i / (SEQUENTIAL_STEPS - 1), colour] for i, colour in enumerate(palette.sequential)]
    bar = colour_bar(BITS, palette, narrow) | labels
    return {"colorscale": steps, "cmin": 0, "cmax": 1, "colorbar": bar}


def plan_figure(
    grid: pd.DataFrame, outside: pd.DataFrame, palette: Palette = LIGHT, *, narrow: bool = False
) -> go.Figure:
    """Heat map of the plan: layer x role, colour = bits per weight; units without a layer in a strip.

    Args:
        grid: from `tables.plan_grid`.
        outside: from `tables.units_without_layer`.
    """
    layers = sorted(set(grid["layer_index"]))
    roles = list(dict.fromkeys(grid["role"]))
    main_px = (18 * len(layers) if narrow else 36 * len(roles)) if len(grid) else 0
    strip_px = 34 * len(outside)
    # In the narrow shape the names of the roles stand between the two.
    gap_px = (_turned_px(roles) if narrow else 12) if main_px and strip_px else 0
    total_px = main_px + strip_px + gap_px
    figure = make_subplots(
        rows=2,
        cols=1,
        row_heights=[max(strip_px, 1), max(main_px, 1)],
        vertical_spacing=gap_px / total_px,
    )
    if len(outside):
        figure.add_trace(_strip(outside), row=1, col=1)
    if len(grid):
        figure.add_trace(_cells(grid, layers, roles, narrow), row=2, col=1)
    height = total_px + (NARROW_BAR_PX + 54 + (0 if strip_px else _turned_px(roles)) if narrow else 60)
    figure.update_layout(coloraxis=bits_axis(palette, narrow, height))
    apply_style_(figure, palette, height=height, narrow=narrow, legend=False)
    if narrow:
        title_bar_(figure, BITS, palette)
    _set_axes_(figure, layers, narrow=narrow)
    return figure


def _turned_px(roles: list[str]) -> int:
    """Height of the roles' names when they stand turned above the columns."""
    return 20 + 6 * max((len(role) for role in roles), default=0)


def _set_axes_(figure: go.Figure, layers: list[int], *, narrow: bool) -> None:
    figure.update_xaxes(showgrid=False, showline=False)
    figure.update_yaxes(showgrid=False, showline=False, autorange="reversed")
    figure.update_xaxes(visible=False, row=1, col=1)
    figure.update_yaxes(visible=False, row=1, col=1)
    if not layers:
        figure.update_xaxes(visible=False)
        figure.update_yaxes(visible=False)
        return
    step = -(-len(layers) // 32)
    layer_axis = {"title": {"text": "layer"}, "dtick": step, "tick0": layers[0], "tickangle": 0}
    if narrow:
        figure.update_xaxes(side="top", tickangle=-50, type="category", row=2, col=1)
        figure.update_yaxes(**layer_axis, row=2, col=1)
    else:
        figure.update_xaxes(**layer_axis, row=2, col=1)
        figure.update_yaxes(type="category", row=2, col=1)


def _hover(row: pd.Series, name: str) -> str:
    bits = f"{number(row['bits_per_weight'])} bits per weight"
    if row["units"] > 1:
        bits = f"mean {bits}; code {number(row['bits_min'])} to {number(row['bits_max'])} bits"
    return (
        f"<b>{safe_label(name)}</b><br>{safe_label(row['formats'])}<br>{bits}<br>"
        f"{size(row['memory_bytes'])}, predicted loss {number(row['predicted_loss'])} nats per token"
    )


def _cells(grid: pd.DataFrame, layers: list[int], roles: list[str], narrow: bool) -> go.Heatmap:
    """Roles down and layers across; in a narrow place the other way round."""
    position = {(row["role"], row["layer_index"]): row for _, row in grid.iterrows()}

    def matrix(make: Any, nothing: str | None = None) -> list[list[Any]]:
        rows = [[make(position[r, n]) if (r, n) in position else nothing for n in layers] for r in roles]
        return [list(column) for column in zip(*rows, strict=True)] if narrow else rows

    labels = [safe_label(role) for role in roles]
    return go.Heatmap(
        x=labels if narrow else layers,
        y=layers if narrow else labels,
        z=matrix(lambda row: bits_position(row["bits_per_weight"])),
        text=matrix(lambda row: f"{row['bits']:.1f}".removesuffix(".0"), ""),
        customdata=matrix(lambda row: _hover(row, f"layer {row['layer_index']} {row['role']}")),
        texttemplate="%{text}" if narrow or len(layers) <= LAYERS_WITH_NUMBERS else None,
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        coloraxis="coloraxis",
        xgap=2,
        ygap=2,
    )


def _strip(outside: pd.DataFrame) -> go.Heatmap:
    names = [f"{row['unit']}: {row['formats']}" for _, row in outside.iterrows()]
    return go.Heatmap(
        x=[0],
        y=list(range(len(outside))),
        z=[[bits_position(bits)] for bits in outside["bits_per_weight"]],
        text=[[safe_label(name)] for name in names],
        customdata=[[_hover(row, row["unit"])] for _, row in outside.iterrows()],
        texttemplate="%{text}",
        hovertemplate="%{customdata}<extra></extra>",
        coloraxis="coloraxis",
        ygap=2,
    )


def formats_figure(shares: pd.DataFrame, palette: Palette = LIGHT, *, narrow: bool = False) -> go.Figure:
    """Heat map of formats and roles: units as numbers, the share of the role's weights as colour.

    Takes `tables.format_shares`.
    """
    formats, roles = (list(dict.fromkeys(shares[column])) for column in ("format", "role"))
    cells = {(row["format"], row["role"]): row for row in shares.to_dict("records")}

    def matrix(make: Any, nothing: str | None = None) -> list[list[Any]]:
        return [[make(cells[name, role]) if (name, role) in cells else nothing for role in roles] for name in formats]

    figure = go.Figure(
        go.Heatmap(
            x=[safe_label(role) for role in roles],
            y=[safe_label(name) for name in formats],
            z=matrix(lambda row: row["percent"]),
            text=matrix(lambda row: f"{row['units']}", ""),
            customdata=matrix(
                lambda row: (
                    f"<b>{safe_label(row['role'])}</b> in {safe_label(row['format'])}<br>{row['units']} units, "
                    f"{percent(row['percent'] / 100)} of the role's weights"
                )
            ),
            texttemplate="%{text}",
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=False,
            colorscale=[[0, palette.surface], [1, palette.accent]],
            zmin=0,
            zmax=100,
            showscale=False,
            xgap=2,
            ygap=2,
        )
    )
    apply_style_(figure, palette, height=30 * len(formats) + (100 if narrow else 60), narrow=narrow, legend=False)
    figure.update_xaxes(showgrid=False, showline=False, side="top", type="category", tickangle=-50 if narrow else 0)
    figure.update_yaxes(showgrid=False, showline=False, autorange="reversed", type="category")
    return figure


def bytes_figure(by_role: pd.DataFrame, palette: Palette = LIGHT, *, narrow: bool = False) -> go.Figure:
    """Bars of bytes by role, stacked by format. Takes `tables.bytes_by_role`."""
    roles = list(dict.fromkeys(by_role["role"]))
    figure = go.Figure()
    seen: set[str] = set()
    by_bits = by_role.groupby("format", sort=False)["bits_per_weight"].mean().sort_values(kind="stable")
    for format_name, bits in by_bits.items():
        rows = by_role[by_role["format"] == format_name]
        colour = bits_colour(float(bits), palette)
        # Formats of nearly the same bits share a colour; a pattern tells them apart.
        pattern = {"shape": "/", "fgcolor": palette.surface} if colour in seen else {}
        seen.add(colour)
        figure.add_bar(
            y=[safe_label(role) for role in rows["role"]],
            x=drawable(rows["memory_bytes"] / tables.MIB),
            orientation="h",
            name=safe_label(format_name),
            marker={"color": colour, "pattern": pattern, "line": {"color": palette.surface, "width": 1}},
            customdata=[
                f"<b>{safe_label(row['role'])}</b>, {safe_label(format_name)}<br>{size(row['memory_bytes'])} "
                f"({percent(row['share'])} of the model), {row['units']} units"
                for _, row in rows.iterrows()
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
    _add_totals_(figure, by_role, roles, palette, narrow=narrow)
    apply_style_(figure, palette, height=34 * len(roles) + 130, narrow=narrow)
    figure.update_layout(barmode="stack", bargap=0.25)
    figure.update_xaxes(title_text="size (MiB)")
    labels = [safe_label(role) for role in roles]
    figure.update_yaxes(
        autorange="reversed", showgrid=False, categoryorder="array", categoryarray=labels, type="category"
    )
    return figure


def _add_totals_(figure: go.Figure, by_role: pd.DataFrame, roles: list[str], palette: Palette, *, narrow: bool) -> None:
    """The size and share of each role, written at the end of its bar."""
    totals = by_role.groupby("role", sort=False)[["memory_bytes", "share"]].sum().loc[roles]
    figure.add_scatter(
        x=drawable(totals["memory_bytes"] / tables.MIB),
        y=[safe_label(role) for role in roles],
        text=[
            f"  {size(memory_bytes)}, {percent(share)}"
            for memory_bytes, share in zip(totals["memory_bytes"], totals["share"], strict=True)
        ],
        mode="text",
        textposition="middle right",
        textfont={"color": palette.muted, "size": 12},
        cliponaxis=False,
        hoverinfo="skip",
        showlegend=False,
    )
    # Room for the text beyond the longest bar.
    room = 2.2 if narrow else 1.25
    figure.update_xaxes(range=[0, room * float(totals["memory_bytes"].max()) / tables.MIB])
