"""What the charts have in common: fonts, axes, error bars, and labels that cannot do harm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from reports.palettes import Palette
from reports.wording import number

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
CLEAR = "rgba(0,0,0,0)"

# Labels in each power of ten, for values that span at most so many powers.
_LOG_STEPS = ((0.6, (1, 1.5, 2, 3, 4, 5, 6, 8)), (2.5, (1, 2, 5)))


def safe_label(text: object) -> str:
    """Text from outside, made harmless: plotly reads labels as a kind of HTML."""
    return escape(str(text), quote=False)


def drawable(column: pd.Series) -> list[float | None]:
    """Floats, with None for what is missing (JSON has no NaN)."""
    return [None if pd.isna(value) else float(value) for value in column]


def drawable_on_log(column: pd.Series) -> list[float | None]:
    """Floats, with None for what a log scale cannot show."""
    return [value if value is not None and value > 0 else None for value in drawable(column)]


def apply_style_(figure: go.Figure, palette: Palette, *, height: int, narrow: bool, legend: bool = True) -> go.Figure:
    axis = {
        "gridcolor": palette.line,
        "linecolor": palette.line,
        "zeroline": False,
        "ticks": "",
        "automargin": True,
        "tickfont": {"color": palette.muted},
        "title": {"font": {"color": palette.muted}, "standoff": 10},
    }
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    figure.update_layout(
        template="none",
        height=height,
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        font={"family": FONT, "size": 12 if narrow else 13, "color": palette.text},
        margin={"l": 8, "r": 8 if narrow else 16, "t": 8, "b": 8},
        showlegend=legend,
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1.02,
            "yanchor": "bottom",
            "bgcolor": CLEAR,
            "traceorder": "normal",
        },
        hoverlabel={"bgcolor": palette.surface, "bordercolor": palette.line, "font": {"color": palette.text}},
        # On a phone a drag must scroll the page.
        dragmode=False if narrow else "zoom",
    )
    return figure


# Height of a colour bar that lies above a narrow chart, with its title and labels.
NARROW_BAR_PX = 80


def colour_bar(title: str, palette: Palette, narrow: bool) -> dict[str, Any]:
    """The bar that explains a chart's colours: on the right, or lying above a narrow chart."""
    bar: dict[str, Any] = {"thickness": 12, "outlinewidth": 0, "tickfont": {"color": palette.muted}}
    if not narrow:
        return bar | {"title": {"text": title, "side": "right", "font": {"size": 13}}}
    # Its title stands above it by itself (title_bar_): plotly draws that of a bar at the edge onto the bar.
    place = {"x": 0.5, "xanchor": "center", "y": 1, "yref": "container", "yanchor": "top", "ypad": 24}
    return bar | place | {"orientation": "h"}


def title_bar_(figure: go.Figure, title: str, palette: Palette) -> None:
    """Makes room above a narrow chart for its colour bar and writes what the bar shows."""
    place = {"x": 0.5, "xref": "paper", "y": 1, "yref": "container", "yanchor": "top", "pad": {"t": 4}}
    font = {"color": palette.muted, "size": 12}
    figure.update_layout(margin_t=NARROW_BAR_PX, title={"text": title, "font": font, "automargin": False, **place})


def share_axis(title: str, palette: Palette, narrow: bool) -> dict[str, Any]:
    """A colour axis of shares from zero on, in another colour than bits."""
    bar = colour_bar(title, palette, narrow) | {"tickformat": ".0%", "nticks": 5}
    return {"colorscale": [[0, palette.page], [1, palette.accent]], "cmin": 0, "colorbar": bar}


def log_axis(title: str, values: Iterable[float | None], *, narrow: bool = False) -> dict[str, Any]:
    """A log axis whose labels are as dense as the span of `values` allows: never too many, never one.

    Args:
        title: what the axis shows, with its unit.
        values: what is drawn along it; those that are missing or not positive do not count.
        narrow: whether there is room for few labels only.
    """
    powers = [math.log10(value) for value in values if value is not None and value > 0]
    span = max(powers) - min(powers) if powers else 1.0
    room = 0.5 if narrow else 1.0
    steps = next((steps for most, steps in _LOG_STEPS if span <= most * room), (1,))
    # Labels outside what is drawn cost nothing, and a menu may bring other values into view.
    ticks = [step * 10.0**power for power in range(-12, 5) for step in steps]
    return {
        "type": "log",
        "title": {"text": title},
        "tickvals": ticks,
        "ticktext": [_tick(value) for value in ticks],
    }


def _tick(value: float) -> str:
    text = number(value, 2)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text.replace(".0e", "e")


def error_bars(value: pd.Series, low: pd.Series, high: pd.Series, colour: str) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": drawable(high - value),
        "arrayminus": drawable(value - low),
        "color": colour,
        "thickness": 1.2,
        "width": 0,
    }
