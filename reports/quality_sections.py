"""The sections about predictions: how sensitive each part is, and whether what was predicted held."""

from __future__ import annotations

import pandas as pd

from reports import charts, tables, wording
from reports.page_parts import Menu, Section, make_chart, make_download, make_listing
from reports.palettes import NAMED
from reports.report import Calibration, Report
from reports.wording import number

# The chart of the most sensitive units names so many.
WORST_UNITS = 15


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
    check = tables.prediction_check(report.evaluations, report.calibration)
    headers = {
        "name": "Name",
        "predicted_kl": "Predicted KL",
        "measured_kl": "Measured KL",
        "kl_low": "Interval from",
        "kl_high": "to",
        "ratio": "Measured / predicted",
        **({"corrected_kl": "Corrected", "corrected_ratio": "Measured / corrected"} if report.calibration else {}),
    }
    return Section(
        key="predictions",
        title="Did the predictions hold?",
        paragraphs=(
            "The solver works with predictions, made from what each part was measured to lose alone. This "
            "chart holds them against the measured loss of whole models. On the dotted line they agree; "
            "above it, the parts hurt each other more than was predicted.",
            *(() if report.calibration is None else (_calibration_paragraph(report.calibration, check),)),
        ),
        charts=(
            make_chart(
                "predictions",
                f"Predicted against measured KL of {wording.count(len(check), 'model')}; see the table.",
                lambda narrow: charts.prediction_figure(check, NAMED, calibration=report.calibration, narrow=narrow),
            ),
        ),
        listing=make_listing("Predictions and measurements", check, headers),
    )


def _calibration_paragraph(calibration: Calibration, check: pd.DataFrame) -> str:
    inside = int(check["corrected_ratio"].between(1 / calibration.error_factor, calibration.error_factor).sum())
    return (
        f"Before any budget was asked, {wording.count(calibration.plans, 'whole plan')} were measured on calibration "
        f"text. The solid line is the law that they follow, KL = {number(calibration.factor)} × "
        f"predicted^{number(calibration.exponent)}; two of three of them lay within a factor of "
        f"{number(calibration.error_factor)} of it, the band. Of the models here, measured on other text, {inside} of "
        f"{int(check['corrected_ratio'].notna().sum())} lie within the band."
    )
