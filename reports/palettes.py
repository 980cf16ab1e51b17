"""Colours of the page and the charts, for a light and a dark screen.

A chart in the page names its colours (`var(--accent)`); the page's script looks them up in the style sheet,
so that the charts follow a change of the colour scheme. `LIGHT` and `DARK` are the same names as values, and
make the figures usable outside the page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Palette:
    """Named colours. `sequential` runs from few to many bits; `categorical` tells roles apart."""

    page: str
    surface: str
    text: str
    muted: str
    line: str
    accent: str
    accent_soft: str
    contrast: str
    sequential: tuple[str, ...]
    categorical: tuple[str, ...]


SEQUENTIAL_STEPS = 13
# Colours span these bits per weight; what lies outside takes the colour of the end.
FEWEST_BITS, MOST_BITS = 2.0, 16.0


def _ramp(*anchors: str) -> tuple[str, ...]:
    """`SEQUENTIAL_STEPS` colours, linear in sRGB between the anchors ('#rrggbb')."""
    channels = [[int(anchor[i : i + 2], 16) for i in (1, 3, 5)] for anchor in anchors]
    colours = []
    for step in range(SEQUENTIAL_STEPS):
        position = step * (len(anchors) - 1) / (SEQUENTIAL_STEPS - 1)
        left = min(int(position), len(anchors) - 2)
        mix = [a + (b - a) * (position - left) for a, b in zip(channels[left], channels[left + 1], strict=True)]
        colours.append("#" + "".join(f"{round(value):02x}" for value in mix))
    return tuple(colours)


LIGHT = Palette(
    page="#f5f6f8",
    surface="#ffffff",
    text="#18212e",
    muted="#576375",
    line="#dde2e9",
    accent="#1f5fd0",
    accent_soft="rgba(31, 95, 208, 0.13)",
    contrast="#c2540a",
    sequential=_ramp("#fdf0b8", "#a8d9ae", "#4fb3b0", "#2a7fb0", "#28529c", "#1d2a63"),
    categorical=(
        "#1f5fd0",
        "#d2600a",
        "#178a57",
        "#b0308f",
        "#8a6a00",
        "#6a4fd0",
        "#c4283f",
        "#00838f",
        "#5f6670",
        "#8a4b2a",
    ),
)

DARK = Palette(
    page="#0f1318",
    surface="#181e26",
    text="#e7ebf1",
    muted="#a0acbb",
    line="#2d3642",
    accent="#7dabff",
    accent_soft="rgba(125, 171, 255, 0.18)",
    contrast="#ffa45c",
    sequential=_ramp("#41326e", "#35588f", "#278a8e", "#4cb67c", "#b3d658", "#fbe983"),
    categorical=(
        "#7dabff",
        "#ffa45c",
        "#55d498",
        "#f08ad8",
        "#e2c044",
        "#b3a6ff",
        "#ff8091",
        "#4fd3e0",
        "#b7bdc7",
        "#d9a688",
    ),
)


def _by_css_name(palette: Palette) -> dict[str, str]:
    names: dict[str, str] = {}
    for field in fields(palette):
        value = getattr(palette, field.name)
        name = field.name.replace("_", "-")
        if isinstance(value, tuple):
            names |= {f"--{name}-{index}": colour for index, colour in enumerate(value)}
        else:
            names[f"--{name}"] = value
    return names


def css_variables(palette: Palette) -> str:
    """The palette as CSS custom properties: '--page: #f5f6f8; ...'."""
    return " ".join(f"{name}: {colour};" for name, colour in _by_css_name(palette).items())


def _named() -> Palette:
    values: dict[str, str | tuple[str, ...]] = {}
    for field in fields(Palette):
        value, name = getattr(LIGHT, field.name), field.name.replace("_", "-")
        many = isinstance(value, tuple)
        values[field.name] = tuple(f"var(--{name}-{i})" for i in range(len(value))) if many else f"var(--{name})"
    return Palette(**values)  # type: ignore[arg-type]


# The same palette by name, for figures whose colours the page's script looks up.
NAMED = _named()


def bits_position(bits_per_weight: float) -> float:
    """Place of a number of bits on the colour scale, 0 to 1, logarithmic: 2 -> 0, 4 -> 1/3, 16 -> 1."""
    span = math.log2(MOST_BITS / FEWEST_BITS)
    clipped = min(max(bits_per_weight, FEWEST_BITS), MOST_BITS)
    return math.log2(clipped / FEWEST_BITS) / span


def bits_colour(bits_per_weight: float, palette: Palette) -> str:
    """The colour of a number of bits: the nearest step of the scale."""
    return palette.sequential[round(bits_position(bits_per_weight) * (SEQUENTIAL_STEPS - 1))]
