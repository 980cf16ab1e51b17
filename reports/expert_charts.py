"""Draws a mixture of experts (how often each is taken, what it is stored in, which work together) and rules' prices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from reports.chart_style import NARROW_BAR_PX, apply_style_, drawable, safe_label, share_axis, title_bar_
from reports.palettes import LIGHT, Palette, bits_position
from reports.plan_charts import BITS, bits_axis
from reports.wording import number, percent, size

# Above this many columns the numbers no longer fit into the cells, in the wide and in the narrow shape.
COLUMNS_WITH_NUMBERS = {False: 40, True: 9}
SHARE, TOGETHER = "share of tokens", "taken together"


def experts_figure(experts: pd.DataFrame, column: str, palette: Palette = LIGHT, *, narrow: bool = False) -> go.Figure:
    """Heat map of experts and layers. Takes `Report.experts`.

    Args:
        experts: one row per expert.
        column: 'frequency' or 'bits_per_weight', what the colour shows.
    """
    layers = sorted({int(layer) for layer in experts["layer_index"]})
    indices = sorted({int(index) for index in experts["expert_index"]})
    cells = {(int(row["layer_index"]), int(row["expert_index"])): row for row in experts.to_dict("records")}
    # Layers down; in a narrow place, which is high, experts down.
    down, across = (indices, layers) if narrow else (layers, indices)

    def matrix(make: Any, nothing: str | None = None) -> list[list[Any]]:
        keys = [[(a, d) if narrow else (d, a) for a in across] for d in down]
        return [[make(cells[key]) if key in cells else nothing for key in row] for row in keys]

    of_bits = column == "bits_per_weight"
    figure = go.Figure(
        go.Heatmap(
            x=across,
            y=down,
            z=matrix(lambda row: bits_position(row[column]) if of_bits else float(row[column])),
            text=matrix(lambda row: number(row[column], 2) if of_bits else f"{100 * row[column]:.0f} %", ""),
            customdata=matrix(_hover),
            texttemplate="%{text}" if len(across) <= COLUMNS_WITH_NUMBERS[narrow] else None,
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=False,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
        )
    )
    height = min(max(len(down) * 22, 120), 1400) + (NARROW_BAR_PX + 54 if narrow else 60)
    share = share_axis(SHARE, palette, narrow)
    figure.update_layout(coloraxis=bits_axis(palette, narrow, height) if of_bits else share)
    apply_style_(figure, palette, height=height, narrow=narrow, legend=False)
    if narrow:
        title_bar_(figure, BITS if of_bits else SHARE, palette)
    _set_axis_titles_(figure, "layer" if narrow else "expert", "expert" if narrow else "layer", across, down)
    return figure


def _set_axis_titles_(figure: go.Figure, across: str, down: str, columns: list[int], rows: list[int]) -> None:
    common = {"showgrid": False, "showline": False, "tickangle": 0}
    figure.update_xaxes(title_text=across, dtick=-(-len(columns) // 24), tick0=columns[0], **common)
    figure.update_yaxes(title_text=down, dtick=-(-len(rows) // 40), tick0=rows[0], autorange="reversed", **common)


def _hover(row: Mapping[Any, Any]) -> str:
    return (
        f"<b>layer {row['layer_index']} expert {row['expert_index']}</b>, group {row['community']}<br>"
        f"taken by {percent(row['frequency'])} of the tokens ({number(row['tokens'], 6)})<br>"
        f"{safe_label(row['formats'])}<br>{number(row['bits_per_weight'])} bits per weight, {size(row['memory_bytes'])}"
    )


def affinity_figure(
    matrices: Mapping[int, pd.DataFrame], shown: int, palette: Palette = LIGHT, *, narrow: bool = False
) -> go.Figure:
    """Heat map of which experts of a layer tokens take together, one trace per layer.

    Each trace carries `meta` {layer}, by which the page's menu chooses what is visible; the numbers of the experts
    stand on the diagonal.

    Args:
        matrices: layer index to `expert_tables.overlap_matrix`.
        shown: the layer that is visible.
    """
    most = max((len(matrix) for matrix in matrices.values()), default=1)
    figure = go.Figure()
    for layer, matrix in matrices.items():
        common = {"meta": {"layer": str(layer)}, "visible": bool(layer == shown)}
        figure.add_trace(_overlaps(layer, matrix).update(common))
        figure.add_scatter(
            x=list(range(len(matrix))),
            y=list(range(len(matrix))),
            text=[str(index) for index in matrix.index],
            mode="text",
            textfont={"color": palette.text, "size": 11 if most <= 40 else 8},
            hoverinfo="skip",
            **common,
        )
    figure.update_layout(coloraxis=share_axis(TOGETHER, palette, narrow))
    side = min(max(most * 24, 220), 340 if narrow else 640)
    apply_style_(figure, palette, height=side + (110 if narrow else 30), narrow=narrow, legend=False)
    if narrow:
        title_bar_(figure, TOGETHER, palette)
    figure.update_xaxes(visible=False, constrain="domain")
    figure.update_yaxes(visible=False, autorange="reversed", scaleanchor="x", constrain="domain")
    return figure


def _overlaps(layer: int, matrix: pd.DataFrame) -> go.Heatmap:
    order, values = [int(index) for index in matrix.index], matrix.to_numpy()
    places = range(len(order))

    def tell(i: int, j: int) -> str:
        share = "" if i == j else f"<br>{percent(float(values[i][j]))} of the tokens of the rarer one take both"
        return f"<b>layer {layer}, experts {order[i]} and {order[j]}</b>{share}"

    return go.Heatmap(
        x=list(places),
        y=list(places),
        z=[[None if i == j else float(values[i][j]) for j in places] for i in places],
        customdata=[[tell(i, j) for j in places] for i in places],
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )


def rule_price_figure(prices: pd.DataFrame, palette: Palette = LIGHT, *, narrow: bool = False) -> go.Figure:
    """Bars of the least predicted loss under each rule. Takes `expert_tables.price_rules`."""
    labels = [_wrap(str(rule), 24 if narrow else 60) for rule in prices["rule"]]
    colours = [palette.accent if i == 0 else palette.contrast for i in range(len(prices))]
    figure = go.Figure(
        go.Bar(
            x=drawable(prices["predicted_loss"]),
            y=labels,
            orientation="h",
            marker={"color": colours},
            text=[_added(row, "<br>  " if narrow else ", ") for row in prices.to_dict("records")],
            textposition="outside",
            textfont={"color": palette.muted, "size": 12},
            cliponaxis=False,
            customdata=[
                f"<b>{safe_label(row['rule'])}</b><br>{row['units']} units<br>predicted loss "
                f"{number(row['predicted_loss'], 4)}"
                for row in prices.to_dict("records")
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    apply_style_(figure, palette, height=(58 if narrow else 40) * len(prices) + 70, narrow=narrow, legend=False)
    room = 1.9 if narrow else 1.3
    title = "nats per token" if narrow else "predicted loss (nats per token)"
    figure.update_xaxes(title_text=title, rangemode="tozero", nticks=4 if narrow else 8)
    figure.update_xaxes(range=[0, room * float(prices["predicted_loss"].max())])
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    figure.update_layout(bargap=0.35)
    return figure


def _added(row: Mapping[Any, Any], between: str) -> str:
    if pd.isna(row["predicted_loss"]):
        return f"  not possible{between}at these bytes"
    added = "" if pd.isna(row["percent"]) or abs(row["percent"]) < 5e-3 else f"{between}{number(row['percent'])} % more"
    return f"  {number(row['predicted_loss'])}{added}"


def _wrap(text: str, most: int) -> str:
    """A label of lines of at most so many characters, made harmless."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > most:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "<br>".join(safe_label(part) for part in [*lines, line])
