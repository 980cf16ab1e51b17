"""The sections of the page: what to say, what to draw, what to list.

The template only lays these out; nothing is computed there.
"""

from __future__ import annotations

import pandas as pd

from reports import charts, tables, wording
from reports.page_parts import (
    Listing,
    Menu,
    Section,
    make_chart,
    make_download,
    make_format_listing,
    make_listing,
)
from reports.palettes import NAMED
from reports.report import Report
from reports.wording import number

# The chart of the most sensitive units names so many.
WORST_UNITS = 15


def comparison_section(report: Report) -> Section:
    """What was measured: the reference, the plans, the uniform baselines."""
    order = {"reference": 0, "plan": 1, "uniform": 2}
    table = report.evaluations.assign(order=report.evaluations["kind"].map(order))
    table = table.sort_values(["order", "memory_bytes"], kind="stable").reset_index(drop=True)
    kinds = {"reference": "reference", "plan": "plan", "uniform": "uniform baseline"}
    shipped_kinds = {"reference": "this plan (nothing quantized)", "uniform": "this plan (uniform)"}
    records = table.to_dict("records")
    rows = tuple(
        (
            str(row["name"]),
            wording.size(row["memory_bytes"]),
            number(row["measured_kl"]),
            wording.interval(row["kl_low"], row["kl_high"]),
            number(row["perplexity"]),
            wording.interval(row["perplexity_low"], row["perplexity_high"]),
            number(row["bits_per_weight"]),
            shipped_kinds.get(row["kind"], "this plan") if row["shipped"] else kinds[row["kind"]],
        )
        for row in records
    )
    listing = Listing(
        caption="Everything that was measured",
        headers=("Name", "Size", "KL", "Interval", "Perplexity", "Interval", "Bits per weight", "Kind"),
        rows=rows,
        numeric=(False, True, True, True, True, True, True, False),
        marked_row=next(i for i, row in enumerate(records) if row["shipped"]),
    )
    return Section(
        key="comparison",
        title="Against the simple alternatives",
        paragraphs=(
            "Each row is a model that was run on held-out text. KL says how far its predictions moved from "
            "those of the reference (0 = not at all), perplexity how well it predicts the text; for both, "
            "lower is better. A uniform baseline stores every part in the same format.",
        ),
        listing=listing,
        open_listing=True,
        download=make_download("evaluations.csv", report.evaluations),
    )


def frontier_section(report: Report) -> Section:
    """Loss against size."""
    curve = tables.frontier_curve(report.frontier)
    points = tables.measured_points(report.evaluations)
    alternative = (
        f"Loss against size: {wording.count(len(curve), 'solved size')} and "
        f"{wording.count(len(points), 'measured model')}. The table below has the same numbers."
    )
    headers = {
        "memory_mib": "Size (MiB)",
        "bits_per_weight": "Bits per weight",
        "predicted_loss": "Predicted loss",
        "lower_bound": "Lower bound",
        "shadow_price_per_mib": "Saved by one more MiB",
    }
    return Section(
        key="frontier",
        title="What more or less space would buy",
        paragraphs=_frontier_paragraphs(report),
        charts=(
            make_chart(
                "frontier",
                alternative,
                lambda narrow: charts.frontier_figure(curve, points, NAMED, narrow=narrow),
            ),
        ),
        listing=make_listing("The best plan found for each size", curve, headers) if len(curve) else None,
        download=make_download("frontier.csv", report.frontier) if len(curve) else None,
    )


def _frontier_paragraphs(report: Report) -> tuple[str, ...]:
    paragraphs = [
        "The line is the lowest predicted loss found for each size. The shaded band below it is all that "
        "any better plan could still gain: the solver proved that no prediction lies below the dotted line. "
        "Where no band is visible, there is next to nothing left to gain. Stars, diamonds and squares were "
        "measured. Further left is smaller, further down is better; each step of the vertical scale "
        "multiplies.",
    ]
    price = tables.shadow_price_at(report.frontier, report.headline.memory_bytes)
    if price is not None:
        paragraphs.append(
            f"At this plan's size, one more MiB would save about {number(price)} nats per token "
            "(the shadow price of the budget)."
        )
    return tuple(paragraphs)


def plan_section(report: Report) -> Section:
    """The heat map of the plan."""
    grid, outside = tables.plan_grid(report.plan), tables.units_without_layer(report.plan)
    paragraphs = [
        "Each cell is one part of the model, its colour the bits stored per weight: the more bits, the more "
        "that part was protected. The number is the width of the code in bits.",
    ]
    if len(grid) and int(grid["units"].max()) > 1:
        paragraphs.append(
            "A cell here can stand for several units, such as the experts of a layer: colour and number are "
            "their mean, and pointing at the cell shows the smallest and the largest."
        )
    bits = report.plan["bits_per_weight"]
    alternative = (
        f"Heat map of {wording.count(len(report.plan), 'unit')}, "
        f"{number(bits.min())} to {number(bits.max())} bits per weight. The table below names each format."
    )
    return Section(
        key="plan",
        title="Which format each part gets",
        paragraphs=tuple(paragraphs),
        charts=(
            make_chart("plan", alternative, lambda narrow: charts.plan_figure(grid, outside, NAMED, narrow=narrow)),
        ),
        listing=make_format_listing(grid, outside),
        download=make_download("plan.csv", report.plan),
    )


def bytes_section(report: Report) -> Section:
    """Bytes by role."""
    by_role = tables.bytes_by_role(report.plan)
    by_role = by_role.assign(memory_mib=by_role["memory_bytes"] / tables.MIB, percent=100 * by_role["share"])
    largest = by_role.groupby("role", sort=False)["share"].sum()
    headers = {
        "role": "Role",
        "format": "Format",
        "units": "Units",
        "weights": "Weights",
        "memory_mib": "Size (MiB)",
        "percent": "Share (%)",
        "bits_per_weight": "Bits per weight",
    }
    alternative = (
        f"Bytes by role: {largest.index[0]} takes {wording.percent(float(largest.iloc[0]))}. "
        "The table below has all of them."
    )
    return Section(
        key="bytes",
        title="Where the bytes are",
        paragraphs=(
            "Each bar adds up all parts with the same role; the colours are the formats they are stored in, "
            "in the same colours as above. Scales, zero points and padding are counted.",
        ),
        charts=(make_chart("bytes", alternative, lambda narrow: charts.bytes_figure(by_role, NAMED, narrow=narrow)),),
        listing=make_listing("Bytes by role and format", by_role, headers),
    )


def sensitivity_section(report: Report) -> Section:
    """Loss of each candidate: by layer and role, and the worst units."""
    sensitivities = report.sensitivities
    names, shown = tables.series_names(sensitivities), tables.usual_series(report.plan, sensitivities)
    by_layer = tables.loss_by_layer(sensitivities)
    by_layer = by_layer[by_layer["series"].isin(names)]
    worst = tables.most_sensitive_units(sensitivities, WORST_UNITS)
    worst = worst[worst["series"].isin(names)]
    roles = [str(role) for role in dict.fromkeys(by_layer["role"])]
    wide = tables.loss_table(sensitivities)
    menus = _sensitivity_menus(names, shown, roles)
    lines = make_chart(
        "layers",
        "Loss by layer, one line for each role, for the format chosen in the menu; the table has all.",
        lambda narrow: charts.layer_loss_figure(by_layer, shown, NAMED, narrow=narrow),
    )
    points = make_chart(
        "worst",
        f"The {WORST_UNITS} units with the largest loss, for the format chosen in the menu.",
        lambda narrow: charts.worst_units_figure(worst, shown, NAMED, narrow=narrow),
    )
    return Section(
        key="sensitivities",
        title="How sensitive each part is",
        paragraphs=_sensitivity_paragraphs(sensitivities, names),
        charts=(*((lines,) if len(by_layer) else ()), points),
        menus=menus,
        listing=make_listing(
            "Loss of each unit in each format, the most sensitive first",
            wide,
            {column: "Unit" if column == "unit" else str(column) for column in wide.columns},
        ),
        download=make_download("sensitivities.csv", sensitivities),
    )


def _sensitivity_menus(names: list[str], shown: str | None, roles: list[str]) -> tuple[Menu, ...]:
    formats = Menu(axis="series", label="Format", options=tuple((name, name) for name in names), selected=shown or "")
    every = (("", "all roles"), *((role, role) for role in roles))
    return formats, Menu(axis="role", label="Role", options=every, selected="")


def _sensitivity_paragraphs(sensitivities: pd.DataFrame, names: list[str]) -> tuple[str, ...]:
    several = sensitivities["expert_index"].notna().any()
    bars = "the smallest and largest loss among the experts" if several else "two standard errors"
    paragraphs = [
        "Each point is the predicted loss if only that part is stored in the chosen format and all else "
        f"stays as it was. The bars are {bars}. Parts high up deserve more bits. "
        "The second chart names the units that suffer most.",
    ]
    drawn = tables.with_series(sensitivities)
    hidden = int(((drawn["loss"] <= 0) & drawn["series"].isin(names)).sum())
    if hidden:
        paragraphs.append(
            f"Not drawn, for this scale cannot show them: {hidden:,} losses at or below zero (noise around "
            "no loss at all). The table has them."
        )
    return tuple(paragraphs)


def prediction_section(report: Report) -> Section:
    """Predicted against measured KL."""
    check = tables.prediction_check(report.evaluations)
    headers = {
        "name": "Name",
        "predicted_kl": "Predicted KL",
        "measured_kl": "Measured KL",
        "kl_low": "Interval from",
        "kl_high": "to",
        "ratio": "Measured / predicted",
    }
    return Section(
        key="predictions",
        title="Did the predictions hold?",
        paragraphs=(
            "The solver works with predictions, made from what each part was measured to lose alone. This "
            "chart holds them against the measured loss of whole models. On the dotted line they agree; "
            "above it, the parts hurt each other more than was predicted.",
        ),
        charts=(
            make_chart(
                "predictions",
                f"Predicted against measured KL of {wording.count(len(check), 'model')}; see the table.",
                lambda narrow: charts.prediction_figure(check, NAMED, narrow=narrow),
            ),
        ),
        listing=make_listing("Predictions and measurements", check, headers),
    )


def build_sections(report: Report) -> tuple[Section, ...]:
    """All sections that the report has data for, in the order of the page."""
    sections = [
        comparison_section(report),
        frontier_section(report),
        plan_section(report),
        bytes_section(report),
    ]
    if len(report.sensitivities):
        sections.append(sensitivity_section(report))
    if report.evaluations["predicted_kl"].notna().any():
        sections.append(prediction_section(report))
    return tuple(sections)
