"""The table behind each chart. Pure: a report's tables go in, a smaller table comes out.

Where a cell stands for several units (the experts of one layer), bits are means weighted by the number
of weights, and the smallest and largest value are kept beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from reports.report import Calibration

MIB = 1024 * 1024


def plan_grid(plan: pd.DataFrame) -> pd.DataFrame:
    """One row per (role, layer): what the units of that cell got.

    Returns:
        Columns role, layer_index, units, bits (mean code width), bits_min, bits_max, bits_per_weight
        (mean), formats (text), memory_bytes, predicted_loss (sum). Roles and layers in plan order.
    """
    layered = plan[plan["layer_index"].notna()]
    rows = [
        {"role": key[0], "layer_index": key[1], **_summarise(cell)}
        for key, cell in layered.groupby(["role", "layer_index"], sort=False)
    ]
    columns = ["role", "layer_index", *_SUMMARY_COLUMNS]
    return pd.DataFrame(rows, columns=columns)


def units_without_layer(plan: pd.DataFrame) -> pd.DataFrame:
    """The units that belong to no layer (embedding, lm_head), same columns as `plan_grid`, by unit."""
    outside = plan[plan["layer_index"].isna()]
    names = outside[["unit", "role"]].to_dict("records")
    rows = [{**name, **_summarise(outside.iloc[[i]])} for i, name in enumerate(names)]
    return pd.DataFrame(rows, columns=["unit", "role", *_SUMMARY_COLUMNS])


_SUMMARY_COLUMNS = [
    "units",
    "bits",
    "bits_min",
    "bits_max",
    "bits_per_weight",
    "formats",
    "memory_bytes",
    "predicted_loss",
]


def _summarise(cell: pd.DataFrame) -> dict[str, object]:
    counts = cell["format"].value_counts(sort=False)
    names = counts.index if len(cell) == 1 else [f"{name} × {count}" for name, count in counts.items()]
    return {
        "units": len(cell),
        "bits": _weighted_mean(cell["bits"], cell["weights"]),
        "bits_min": float(cell["bits"].min()),
        "bits_max": float(cell["bits"].max()),
        "bits_per_weight": _weighted_mean(cell["bits_per_weight"], cell["weights"]),
        "formats": ", ".join(str(name) for name in names),
        "memory_bytes": float(cell["memory_bytes"].sum()),
        "predicted_loss": float(cell["predicted_loss"].sum(min_count=1)),
    }


def _weighted_mean(values: pd.Series, weights: pd.Series) -> float:
    total = float(weights.sum())
    # Units without weights (a KV cache) count equally.
    return float((values * weights).sum()) / total if total else float(values.mean())


def bytes_by_role(plan: pd.DataFrame) -> pd.DataFrame:
    """One row per (role, format): units, weights, memory_bytes, share of all bytes, bits_per_weight.

    The role with the most bytes comes first, and inside a role the format with the fewest bits.
    """
    keys = ["role", "format"]
    table = plan.groupby(keys, sort=False, as_index=False).agg(
        units=("unit", "size"), weights=("weights", "sum"), memory_bytes=("memory_bytes", "sum")
    )
    means = [_weighted_mean(g["bits_per_weight"], g["weights"]) for _, g in plan.groupby(keys, sort=False)]
    table["bits_per_weight"] = means
    table["share"] = table["memory_bytes"] / table["memory_bytes"].sum()
    table["role_bytes"] = table.groupby("role")["memory_bytes"].transform("sum")
    table = table.sort_values(["role_bytes", "role", "bits_per_weight"], ascending=[False, True, True], kind="stable")
    return table.drop(columns="role_bytes").reset_index(drop=True)


def role_totals(plan: pd.DataFrame, *, most_formats: int) -> pd.DataFrame:
    """One row per role: units, memory_bytes, share of all bytes, bits_per_weight, and its formats as text.

    Args:
        plan: the plan's table.
        most_formats: so many are named, those with the most units; the others are counted.
    """
    rows = []
    for role, cells in plan.groupby("role", sort=False):
        counts = cells["format"].value_counts()
        named = ", ".join(f"{name} × {count}" for name, count in counts.head(most_formats).items())
        more = len(counts) - most_formats
        rows.append(
            {
                "role": role,
                "units": len(cells),
                "memory_bytes": float(cells["memory_bytes"].sum()),
                "share": float(cells["memory_bytes"].sum() / plan["memory_bytes"].sum()),
                "bits_per_weight": _weighted_mean(cells["bits_per_weight"], cells["weights"]),
                "formats": f"{named} and {more} more" if more > 0 else named,
            }
        )
    return pd.DataFrame(rows).sort_values("memory_bytes", ascending=False, kind="stable", ignore_index=True)


def format_shares(by_role: pd.DataFrame) -> pd.DataFrame:
    """What part of each role's weights is in each format, from `bytes_by_role`.

    Returns:
        Columns format, role, units, bits_per_weight, percent (of the role's weights; of its bytes where it has none,
        as a cache). The format with the fewest bits comes first, roles in the order of `by_role`.
    """
    amounts = by_role["weights"].astype("float64")
    role_amounts = amounts.groupby(by_role["role"]).transform("sum")
    amounts = amounts.where(role_amounts > 0, by_role["memory_bytes"])
    percent = 100 * amounts / amounts.groupby(by_role["role"]).transform("sum")
    bits = by_role.groupby("format")["bits_per_weight"].transform("mean")
    table = by_role[["format", "role", "units", "bits_per_weight"]].assign(percent=percent, bits=bits)
    return table.sort_values(["bits", "format"], kind="stable").drop(columns="bits").reset_index(drop=True)


def frontier_curve(frontier: pd.DataFrame) -> pd.DataFrame:
    """The frontier by increasing size, with memory_mib beside memory_bytes."""
    curve = frontier.sort_values("memory_bytes", kind="stable").reset_index(drop=True)
    return curve.assign(memory_mib=curve["memory_bytes"] / MIB)


def shadow_price_at(frontier: pd.DataFrame, memory_bytes: float) -> float | None:
    """Nats that one more MiB would save at this size: that of the largest solved size not above it.

    None where the frontier has no such size or no price for it.
    """
    curve = frontier_curve(frontier)
    below = curve[(curve["memory_bytes"] <= memory_bytes) & curve["shadow_price_per_mib"].notna()]
    return None if below.empty else float(below["shadow_price_per_mib"].iloc[-1])


def measured_points(evaluations: pd.DataFrame) -> pd.DataFrame:
    """The plans and baselines that were measured (not the reference), by size.

    Returns:
        The evaluations' columns, memory_mib, and group: 'shipped', 'plan' or 'uniform'.
    """
    points = evaluations[evaluations["kind"] != "reference"].sort_values("memory_bytes", kind="stable")
    group = points["kind"].astype("str").where(~points["shipped"].astype(bool), "shipped")
    return points.assign(memory_mib=points["memory_bytes"] / MIB, group=group).reset_index(drop=True)


def prediction_check(evaluations: pd.DataFrame, calibration: Calibration | None = None) -> pd.DataFrame:
    """Predicted beside measured KL for everything that has a prediction.

    Returns:
        Columns name, group, predicted_kl, measured_kl, kl_low, kl_high, ratio (measured / predicted,
        missing where the prediction is not positive), corrected_kl and corrected_ratio (missing without calibration).
    """
    points = measured_points(evaluations)
    points = points[points["predicted_kl"].notna()].reset_index(drop=True)
    ratio = points["measured_kl"] / points["predicted_kl"].where(points["predicted_kl"] > 0)
    columns = ["name", "group", "predicted_kl", "measured_kl", "kl_low", "kl_high"]
    predicted = points["predicted_kl"].where(points["predicted_kl"] > 0).astype("float64")
    corrected = predicted * math.nan if calibration is None else calibration.factor * predicted**calibration.exponent
    return points[columns].assign(
        ratio=ratio.astype("float64"), corrected_kl=corrected, corrected_ratio=points["measured_kl"] / corrected
    )


def with_series(sensitivities: pd.DataFrame) -> pd.DataFrame:
    """Adds `series`, what one line of a chart is about: the format, and the metric if there are several."""
    several = sensitivities["metric"].nunique() > 1
    series = sensitivities["format"].astype("str")
    return sensitivities.assign(series=series + " · " + sensitivities["metric"] if several else series)


def loss_by_layer(sensitivities: pd.DataFrame) -> pd.DataFrame:
    """Loss per (series, role, layer): the mean over the units of the cell.

    Returns:
        Columns series, bits, role, layer_index, units, loss, low, high. For one unit low and high are
        loss -/+ 2 standard errors; for several they are the smallest and largest loss among them.
    """
    layered = with_series(sensitivities)
    layered = layered[layered["layer_index"].notna()]
    keys = ["series", "role", "layer_index"]
    table = layered.groupby(keys, sort=False, as_index=False).agg(
        bits=("bits", "mean"),
        units=("loss", "size"),
        loss=("loss", "mean"),
        low=("loss", "min"),
        high=("loss", "max"),
        std_error=("std_error", "mean"),
    )
    spread = (2 * table["std_error"].fillna(0.0)).where(table["units"] == 1, 0.0)
    table = table.assign(low=table["low"] - spread, high=table["high"] + spread)
    return table[["series", "bits", "role", "layer_index", "units", "loss", "low", "high"]]


def most_sensitive_units(sensitivities: pd.DataFrame, count: int) -> pd.DataFrame:
    """The `count` units with the largest loss in each series, worst first.

    Returns:
        Columns series, unit, label, loss, low, high (-/+ 2 standard errors).
    """
    table = with_series(sensitivities)
    table = table.sort_values("loss", ascending=False, kind="stable")
    table = table.groupby("series", sort=False).head(count).reset_index(drop=True)
    spread = 2 * table["std_error"].fillna(0.0)
    table = table.assign(low=table["loss"] - spread, high=table["loss"] + spread)
    table["label"] = [_unit_label(row) for row in table.to_dict("records")]
    return table[["series", "unit", "label", "loss", "low", "high"]]


def _unit_label(row: Mapping[Any, Any]) -> str:
    if pd.isna(row["layer_index"]):
        return str(row["unit"])
    expert = "" if pd.isna(row["expert_index"]) else f" e{row['expert_index']}"
    return f"layer {row['layer_index']} {row['role']}{expert}"


def loss_table(sensitivities: pd.DataFrame) -> pd.DataFrame:
    """Units down, series across (fewest bits first), the loss in the cells; the worst unit first."""
    table = with_series(sensitivities)
    order = table.groupby("series")["bits"].mean().sort_values(kind="stable").index
    wide = table.pivot_table(index="unit", columns="series", values="loss", aggfunc="mean", sort=False)
    wide = wide[[name for name in order if name in wide.columns]]
    worst = wide.max(axis=1).sort_values(ascending=False, kind="stable").index
    return wide.loc[worst].rename_axis(columns=None).reset_index()


def series_names(sensitivities: pd.DataFrame) -> list[str]:
    """The series that a log scale can show (some loss above zero), fewest bits first."""
    table = with_series(sensitivities)
    table = table[table["loss"] > 0]
    return [str(name) for name in table.groupby("series")["bits"].mean().sort_values(kind="stable").index]


def usual_series(report_plan: pd.DataFrame, sensitivities: pd.DataFrame) -> str | None:
    """The series of the format that holds most of the plan's weights, if it was measured."""
    names = series_names(sensitivities)
    weights = report_plan.groupby("format", sort=False)["weights"].sum().sort_values(ascending=False)
    for format_name in weights.index:
        for name in names:
            if name == format_name or name.startswith(f"{format_name} · "):
                return name
    return names[0] if names else None
