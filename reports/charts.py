"""Draws the charts. Each takes tables of `reports.tables` and returns a plotly figure.

Every chart comes in two shapes, for a wide and for a narrow place (a phone), and takes a `Palette`. Those
about quality are here; those about what the plan stores are in `reports.plan_charts`.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from reports.chart_style import apply_style_, drawable, drawable_on_log, error_bars, log_axis, safe_label
from reports.palettes import LIGHT, Palette
from reports.plan_charts import bytes_figure, formats_figure, plan_figure
from reports.report import Calibration
from reports.wording import interval, number, size

__all__ = [
    "bytes_figure",
    "formats_figure",
    "frontier_figure",
    "layer_loss_figure",
    "plan_figure",
    "prediction_figure",
    "worst_units_figure",
]

SYMBOLS = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "x",
    "triangle-down",
    "cross",
    "star",
    "pentagon",
    "hexagram",
)
# What was measured: name in the legend, symbol, symbol size in px.
GROUPS = {
    "shipped": ("This plan, measured", "star", 15),
    "plan": ("Other plans, measured", "diamond", 10),
    "uniform": ("Uniform baselines, measured", "square", 9),
}


# The part of a wide chart that a label takes, along x and y.
LABEL_SHARE = (0.3, 0.15)


def _group_colour(group: str, palette: Palette) -> str:
    return {"shipped": palette.text, "plan": palette.accent, "uniform": palette.contrast}[group]


def _measured_traces(points: pd.DataFrame, x: str, palette: Palette, *, names_at: str | None) -> list[go.Scatter]:
    """One trace for each group of measured models, with error bars in KL.

    `names_at` says where the names of the uniform baselines stand, None for nowhere.
    """
    traces = []
    for group, (legend, symbol, size_px) in GROUPS.items():
        rows = points[points["group"] == group]
        colour = _group_colour(group, palette)
        traces.append(
            go.Scatter(
                x=drawable(rows[x]),
                y=drawable_on_log(rows["measured_kl"]),
                error_y=error_bars(rows["measured_kl"], rows["kl_low"], rows["kl_high"], colour),
                mode="markers+text" if names_at and group == "uniform" else "markers",
                text=_labels(rows, x) if group == "uniform" else None,
                textposition=names_at,
                textfont={"color": palette.muted, "size": 11},
                name=legend,
                marker={"color": colour, "symbol": symbol, "size": size_px},
                customdata=[
                    f"<b>{safe_label(row['name'])}</b><br>measured KL {number(row['measured_kl'])} "
                    f"{interval(row['kl_low'], row['kl_high'])}<br>predicted {number(row['predicted_kl'])}"
                    for row in rows.to_dict("records")
                ],
                hovertemplate="%{customdata}<extra></extra>",
            )
        )
    return [trace for trace in traces if trace.x]


def _labels(rows: pd.DataFrame, x: str) -> list[str]:
    """The names of points, but of points that lie close together in the wide chart only the first one's."""
    places = pd.DataFrame({"x": rows[x], "y": rows["measured_kl"].where(rows["measured_kl"] > 0).map(math.log10)})
    spans = (places.max() - places.min()).replace(0, 1)
    labels: list[str] = []
    taken: list[tuple[float, float]] = []
    for name, place_x, place_y in zip(rows["name"], places["x"] / spans["x"], places["y"] / spans["y"], strict=True):
        # A label covers about so much of the chart: it stands to the right of its point.
        free = all(abs(place_x - a) > LABEL_SHARE[0] or abs(place_y - b) > LABEL_SHARE[1] for a, b in taken)
        if free:
            taken.append((place_x, place_y))
        labels.append(safe_label(str(name).removeprefix("uniform ")) if free else "")
    return labels


def _curve_traces(curve: pd.DataFrame, palette: Palette) -> list[go.Scatter]:
    """The proven bound, and the curve with the band between the two."""
    sizes = drawable(curve["memory_mib"])
    bound = go.Scatter(
        x=sizes,
        y=drawable_on_log(curve["lower_bound"]),
        mode="lines",
        line={"color": palette.muted, "dash": "dot", "width": 1.5},
        name="Proven lower bound",
        hovertemplate="no plan of %{x:.4~g} MiB is below %{y:.3~g}<extra></extra>",
    )
    best = go.Scatter(
        x=sizes,
        y=drawable_on_log(curve["predicted_loss"]),
        mode="lines",
        fill="tonexty",
        fillcolor=palette.accent_soft,
        line={"color": palette.accent, "width": 2.5},
        name="Best plans found, predicted",
        customdata=[
            f"{size(row['memory_bytes'])}, {number(row['bits_per_weight'])} bits per weight<br>"
            f"predicted loss {number(row['predicted_loss'])}<br>"
            f"one more MiB saves {number(row['shadow_price_per_mib'])}"
            for row in curve.to_dict("records")
        ],
        hovertemplate="%{customdata}<extra></extra>",
    )
    return [bound, best]


def frontier_figure(
    curve: pd.DataFrame, points: pd.DataFrame, palette: Palette = LIGHT, *, narrow: bool = False
) -> go.Figure:
    """Predicted loss against size, the proven lower bound below it, and what was measured.

    Args:
        curve: from `tables.frontier_curve`; may be empty.
        points: from `tables.measured_points`.
    """
    figure = go.Figure(_curve_traces(curve, palette) if len(curve) else [])
    figure.add_traces(_measured_traces(points, "memory_mib", palette, names_at=None if narrow else "top right"))
    losses = _loss_range(curve, points)
    sizes = pd.concat([points["memory_mib"], curve.loc[curve["predicted_loss"] >= losses[0], "memory_mib"]])
    if len(sizes):
        margin = max(0.05 * float(sizes.max() - sizes.min()), 0.02 * float(sizes.max()))
        figure.update_xaxes(range=[float(sizes.min()) - margin, float(sizes.max()) + margin])
    figure.update_xaxes(title_text="size in memory (MiB)")
    y_axis = log_axis("loss (nats per token)", losses)
    figure.update_yaxes(**y_axis, range=[math.log10(loss) for loss in losses])
    return apply_style_(figure, palette, height=420 if narrow else 460, narrow=narrow)


def _loss_range(curve: pd.DataFrame, points: pd.DataFrame) -> tuple[float, float]:
    """What the loss axis shows: all that was measured, and the curve down to a fifth of that.

    Near the unquantized model the curve falls for many powers of ten, which would flatten the rest.
    """
    measured = points["measured_kl"][points["measured_kl"] > 0]
    losses = measured if len(measured) else curve["predicted_loss"][curve["predicted_loss"] > 0]
    return (float(losses.min()) / 5, float(losses.max()) * 3) if len(losses) else (1e-3, 1.0)


def prediction_figure(
    check: pd.DataFrame,
    palette: Palette = LIGHT,
    *,
    calibration: Calibration | None = None,
    narrow: bool = False,
) -> go.Figure:
    """Measured against predicted KL, both on log scales, with the line where they agree.

    Args:
        check: from `tables.prediction_check`.
        calibration: the law of measured plans, drawn with its error as a band; None to leave it out.
    """
    figure = go.Figure()
    shown = check[(check["predicted_kl"] > 0) & (check["measured_kl"] > 0)]
    if len(shown):
        both = pd.concat([shown["predicted_kl"], shown["measured_kl"]])
        ends = [float(both.min()) / 1.5, float(both.max()) * 1.5]
        figure.add_scatter(
            x=ends,
            y=ends,
            mode="lines",
            line={"color": palette.muted, "dash": "dot", "width": 1.5},
            name="Prediction and measurement agree",
            hoverinfo="skip",
        )
        if calibration is not None:
            figure.add_traces(_law_traces(calibration, ends, palette))
    figure.add_traces(_measured_traces(shown, "predicted_kl", palette, names_at=None if narrow else "bottom right"))
    figure.update_xaxes(**log_axis("predicted KL (nats per token)", shown["predicted_kl"], narrow=narrow))
    figure.update_yaxes(**log_axis("measured KL (nats per token)", shown["measured_kl"]))
    return apply_style_(figure, palette, height=400 if narrow else 440, narrow=narrow)


def _law_traces(calibration: Calibration, ends: list[float], palette: Palette) -> list[go.Scatter]:
    """The corrected prediction and the band that holds two of three measured plans; straight on log scales."""
    law = [calibration.factor * end**calibration.exponent for end in ends]
    edge: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    low = go.Scatter(x=ends, y=[kl / calibration.error_factor for kl in law], showlegend=False, **edge)
    high = go.Scatter(
        x=ends,
        y=[kl * calibration.error_factor for kl in law],
        fill="tonexty",
        fillcolor=palette.accent_soft,
        showlegend=False,
        **edge,
    )
    line = {"color": palette.accent, "width": 1.5}
    best = go.Scatter(x=ends, y=law, mode="lines", line=line, name="Corrected prediction", hoverinfo="skip")
    return [low, high, best]


def layer_loss_figure(
    by_layer: pd.DataFrame, shown: str | None, palette: Palette = LIGHT, *, narrow: bool = False
) -> go.Figure:
    """Loss of each layer, one line per role; one series (a format) is visible at first.

    Each trace carries `meta` {series, role}, by which the page's menus choose what is visible.

    Args:
        by_layer: from `tables.loss_by_layer`.
        shown: the series that is visible.
    """
    figure = go.Figure()
    roles = list(dict.fromkeys(by_layer["role"]))
    for (series, role), rows in by_layer.groupby(["series", "role"], sort=False):
        place = roles.index(role)
        rows = rows[rows["loss"] > 0].sort_values("layer_index")
        colour = palette.categorical[place % len(palette.categorical)]
        figure.add_scatter(
            x=drawable(rows["layer_index"]),
            y=drawable(rows["loss"]),
            error_y=error_bars(rows["loss"], rows["low"], rows["high"], colour),
            mode="lines+markers",
            name=safe_label(role),
            meta={"series": str(series), "role": str(role)},
            visible=bool(series == shown),
            line={"color": colour, "width": 1.2},
            marker={"color": colour, "symbol": SYMBOLS[place % len(SYMBOLS)], "size": 6},
            customdata=[
                f"<b>layer {row['layer_index']} {safe_label(role)}</b>, {safe_label(series)}<br>"
                f"loss {number(row['loss'])} {interval(row['low'], row['high'])}"
                for row in rows.to_dict("records")
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
    visible = by_layer.loc[by_layer["series"] == shown, "loss"]
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(**log_axis("loss (nats per token)", visible))
    return apply_style_(figure, palette, height=460, narrow=narrow)


def worst_units_figure(
    worst: pd.DataFrame, shown: str | None, palette: Palette = LIGHT, *, narrow: bool = False
) -> go.Figure:
    """The units with the largest loss, worst on top. Takes `tables.most_sensitive_units`.

    Each trace carries `meta` {series}, by which the page's menu chooses what is visible.
    """
    figure = go.Figure()
    for series, rows in worst.groupby("series", sort=False):
        rows = rows[rows["loss"] > 0]
        figure.add_scatter(
            x=drawable(rows["loss"]),
            y=[safe_label(label) for label in rows["label"]],
            error_x=error_bars(rows["loss"], rows["low"], rows["high"], palette.accent),
            mode="markers",
            name=safe_label(series),
            meta={"series": str(series)},
            visible=bool(series == shown),
            marker={"color": palette.accent, "size": 9},
            customdata=[
                f"<b>{safe_label(row['unit'])}</b><br>loss {number(row['loss'])} {interval(row['low'], row['high'])}"
                for row in rows.to_dict("records")
            ],
            hovertemplate="%{customdata}<extra></extra>",
        )
    deepest = int(worst.groupby("series").size().max()) if len(worst) else 1
    visible = worst.loc[worst["series"] == shown, "loss"]
    figure.update_xaxes(**log_axis("loss (nats per token)", visible, narrow=narrow))
    figure.update_yaxes(autorange="reversed", type="category")
    return apply_style_(figure, palette, height=26 * deepest + 80, narrow=narrow, legend=False)
