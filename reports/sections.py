"""The sections of the page: what to say, what to draw, what to list.

The template only lays these out; nothing is computed there.
"""

from __future__ import annotations

from reports import charts, tables, wording
from reports.expert_sections import affinity_section, expert_section, rule_section
from reports.page_parts import (
    Listing,
    Section,
    make_chart,
    make_download,
    make_format_listing,
    make_listing,
)
from reports.palettes import NAMED
from reports.quality_sections import prediction_section, sensitivity_section
from reports.report import Report
from reports.wording import number


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


def formats_section(report: Report) -> Section:
    """Which formats were chosen where."""
    by_role = tables.bytes_by_role(report.plan)
    shares = tables.format_shares(by_role)
    drawn = (
        f"{wording.count(shares['format'].nunique(), 'format')} by {wording.count(shares['role'].nunique(), 'role')}"
    )
    headers = {"format": "Format", "role": "Role", "units": "Units", "percent": "Share of the role's weights (%)"}
    return Section(
        key="formats",
        title="Which formats were chosen where",
        paragraphs=(
            "Each row is a format, each column a role; the number says how many of the role's units got the format, "
            "the colour how much of the role's weights that is.",
        ),
        charts=(
            make_chart(
                "formats",
                f"{drawn}; the table below has all counts.",
                lambda narrow: charts.formats_figure(shares, NAMED, narrow=narrow),
            ),
        ),
        listing=make_listing("Units of each role in each format", shares, headers),
    )


def build_sections(report: Report) -> tuple[Section, ...]:
    """All sections that the report has data for, in the order of the page."""
    sections = [
        comparison_section(report),
        frontier_section(report),
        plan_section(report),
        formats_section(report),
        bytes_section(report),
    ]
    if len(report.rule_prices) > 1:
        sections.append(rule_section(report))
    if len(report.experts):
        sections.append(expert_section(report))
    if len(report.affinity):
        sections.append(affinity_section(report))
    if len(report.sensitivities):
        sections.append(sensitivity_section(report))
    if report.evaluations["predicted_kl"].notna().any():
        sections.append(prediction_section(report))
    return tuple(sections)
