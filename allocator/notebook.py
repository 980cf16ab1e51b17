"""Plans and frontiers as a notebook shows them: a few lines and a table, escaped, nothing heavy loaded."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import log10
from typing import Protocol

from runtime.notebook_html import bits_shade, html_heading, html_table

WIDTH_PX, HEIGHT_PX, MARGIN_PX = 560, 220, 46
# What a table shows of every point of a frontier -> its header.
_SHOWN = {"bits_per_weight": "bits per weight", "predicted_loss": "predicted loss", "lower_bound": "lower bound"}


class UnitRow(Protocol):
    """What is shown of a unit of a plan."""

    @property
    def unit(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def layer_index(self) -> int | None: ...
    @property
    def format(self) -> str: ...
    @property
    def bits(self) -> int: ...


def plan_html(title: str, lines: Sequence[str], units: Sequence[UnitRow]) -> str:
    """Returns a plan as HTML: what it is, and the formats of its layers, one row a layer.

    Args:
        title: The heading.
        lines: What is said of the whole.
        units: Its units.
    """
    roles = list(dict.fromkeys(unit.role for unit in units if unit.layer_index is not None))
    outside = [f"{unit.unit} {unit.format}" for unit in units if unit.layer_index is None]
    layers = sorted({unit.layer_index for unit in units if unit.layer_index is not None})
    cells: dict[tuple[int | None, str], list[tuple[str, float]]] = {}
    for unit in units:
        cells.setdefault((unit.layer_index, unit.role), []).append((unit.format, unit.bits))
    rows = [[f"layer {layer}", *(_formats(cells.get((layer, role), [])) for role in roles)] for layer in layers]
    shades = [[_shade(cells.get((layer, role), [])) for role in roles] for layer in layers]
    beside = ["outside the layers: " + ", ".join(outside)] if outside else []
    return html_heading(title, *lines, *beside) + html_table(["", *roles], rows, shades=shades)


def _formats(cell: Sequence[tuple[str, float]]) -> str:
    counts = Counter(name for name, _ in cell)
    return ", ".join(name if len(cell) == 1 else f"{name} × {count}" for name, count in counts.most_common())


def _shade(cell: Sequence[tuple[str, float]]) -> float:
    return bits_shade(sum(bits for _, bits in cell) / len(cell)) if cell else 0.0


class Frontier(list[dict[str, float]]):
    """Points of least loss by size: a list of dicts that a notebook draws."""

    def _repr_html_(self) -> str:
        return frontier_html(self)


def frontier_html(points: Sequence[Mapping[str, float]]) -> str:
    """Returns a frontier as HTML: a line of the loss by size, on a log scale, and its points."""
    # Along another resource than memory a point has its use too.
    own = sorted(set().union(*points) - set(_SHOWN) - {"memory_bytes", "shadow_price_per_mib", "shadow_price"})
    price = "shadow_price" if own else "shadow_price_per_mib"
    rows = [
        [f"{point['memory_bytes'] / 2**20:.2f}", *(point[name] for name in (*own, *_SHOWN, price))] for point in points
    ]
    headers = ["MiB", *own, *_SHOWN.values(), "one more of it saves" if own else "one more MiB saves"]
    line = _line(points, "memory_bytes", 2.0**20, "MiB") if not own else _line(points, own[0], 1.0, own[0])
    return html_heading(f"Frontier of {len(points)} sizes, losses in nats per token") + line + html_table(headers, rows)


def _line(points: Sequence[Mapping[str, float]], along: str, unit: float, unit_name: str) -> str:
    shown = [(p[along] / unit, log10(p["predicted_loss"])) for p in points if p["predicted_loss"] > 0]
    if len(shown) < 2:
        return ""
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*shown, strict=True))
    across, down = (WIDTH_PX - 2 * MARGIN_PX) / ((right - left) or 1), (HEIGHT_PX - 2 * MARGIN_PX) / ((high - low) or 1)
    path = " ".join(f"{MARGIN_PX + (x - left) * across:.1f},{MARGIN_PX + (high - y) * down:.1f}" for x, y in shown)
    label = '<text x="{x}" y="{y}" fill="currentColor" font-size="11" text-anchor="{anchor}">{text}</text>'
    bottom = HEIGHT_PX - MARGIN_PX
    labels = [
        label.format(x=MARGIN_PX, y=bottom + 26, anchor="start", text=f"{left:.4g} {unit_name}"),
        label.format(x=WIDTH_PX - MARGIN_PX, y=bottom + 26, anchor="end", text=f"{right:.4g} {unit_name}"),
        label.format(x=MARGIN_PX - 6, y=MARGIN_PX + 4, anchor="end", text=f"{10**high:.2g}"),
        label.format(x=MARGIN_PX - 6, y=bottom + 4, anchor="end", text=f"{10**low:.2g}"),
    ]
    return (
        f'<svg width="{WIDTH_PX}" height="{HEIGHT_PX}" role="img" aria-label="Loss by size">'
        f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="2"/>{"".join(labels)}</svg>'
    )
