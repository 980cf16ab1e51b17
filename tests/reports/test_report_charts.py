"""The figures show their tables: what is drawn, not how it looks."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from reports import charts, tables
from reports.chart_style import log_axis
from reports.palettes import DARK, LIGHT, NAMED, SEQUENTIAL_STEPS, bits_colour, bits_position, css_variables
from reports.report import Report

HOSTILE = "<a href='https://example.com'>x</a>"


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_plan_heat_map_holds_the_bits_of_each_cell(dense_report: Report, narrow: bool) -> None:
    grid = tables.plan_grid(dense_report.plan)
    outside = tables.units_without_layer(dense_report.plan)
    strip, cells = charts.plan_figure(grid, outside, narrow=narrow).data
    roles, layers = (cells.x, cells.y) if narrow else (cells.y, cells.x)
    assert list(layers) == list(range(30))
    row = grid[(grid["role"] == "v_proj") & (grid["layer_index"] == 7)].iloc[0]
    place = list(roles).index("v_proj")
    value, text = (cells.z[7][place], cells.text[7][place]) if narrow else (cells.z[place][7], cells.text[place][7])
    assert value == bits_position(row["bits_per_weight"])
    assert text == str(int(row["bits"]))
    assert strip.text[0][0].startswith("embed_tokens: int")


def test_plan_heat_map_leaves_cells_without_a_unit_empty(dense_report: Report) -> None:
    grid = tables.plan_grid(dense_report.plan)
    grid = grid[~((grid["role"] == "q_proj") & (grid["layer_index"] == 3))]
    (cells,) = charts.plan_figure(grid, tables.units_without_layer(dense_report.plan.tail(1))).data
    assert cells.z[list(cells.y).index("q_proj")][3] is None


def test_plan_without_layers_is_only_a_strip(dense_report: Report) -> None:
    plan = dense_report.plan[dense_report.plan["layer_index"].isna()]
    (strip,) = charts.plan_figure(tables.plan_grid(plan), tables.units_without_layer(plan)).data
    assert len(strip.z) == 1


def test_cells_of_experts_tell_the_smallest_and_the_largest(moe_report: Report) -> None:
    grid = tables.plan_grid(moe_report.plan)
    mixed = grid[grid["bits_min"] < grid["bits_max"]].iloc[0]
    cells = charts.plan_figure(grid, tables.units_without_layer(moe_report.plan)).data[1]
    hover = cells.customdata[list(cells.y).index(mixed["role"])][mixed["layer_index"]]
    assert f"code {mixed['bits_min']:.2f} to {mixed['bits_max']:.2f} bits" in hover


def test_frontier_has_the_curve_its_bound_and_each_measured_group(dense_report: Report) -> None:
    curve = tables.frontier_curve(dense_report.frontier)
    points = tables.measured_points(dense_report.evaluations)
    figure = charts.frontier_figure(curve, points)
    bound, best, shipped, plans, uniform = figure.data
    assert figure.layout.yaxis.type == "log"
    assert list(best.x) == list(curve["memory_mib"])
    # A log scale cannot show the loss of zero at 16 bits.
    assert list(best.y) == [loss if loss > 0 else None for loss in curve["predicted_loss"]]
    assert all(low <= loss for low, loss in zip(bound.y, best.y, strict=True) if low is not None)
    headline = dense_report.headline
    assert list(shipped.y) == [headline.measured_kl]
    assert shipped.error_y.array[0] == pytest.approx(headline.measured_kl_high - headline.measured_kl)
    assert shipped.error_y.arrayminus[0] == pytest.approx(headline.measured_kl - headline.measured_kl_low)
    assert (len(plans.x), len(uniform.x)) == (1, 6)


def test_frontier_shows_all_that_was_measured(dense_report: Report) -> None:
    points = tables.measured_points(dense_report.evaluations)
    figure = charts.frontier_figure(tables.frontier_curve(dense_report.frontier), points)
    low, high = (10**end for end in figure.layout.yaxis.range)
    assert points["measured_kl"].between(low, high).all()
    assert points["memory_mib"].between(*figure.layout.xaxis.range).all()


def test_frontier_without_solved_sizes_still_shows_measurements(dense_report: Report) -> None:
    points = tables.measured_points(dense_report.evaluations)
    figure = charts.frontier_figure(tables.frontier_curve(dense_report.frontier.head(0)), points)
    assert len(figure.data) == 3


def test_predictions_are_drawn_against_the_line_of_agreement(dense_report: Report) -> None:
    check = tables.prediction_check(dense_report.evaluations)
    identity, *groups = charts.prediction_figure(check).data
    assert list(identity.x) == list(identity.y)
    drawn = sorted((x, y) for group in groups for x, y in zip(group.x, group.y, strict=True))
    assert drawn == sorted(zip(check["predicted_kl"], check["measured_kl"], strict=True))


def test_layer_losses_have_one_line_per_format_and_role(dense_report: Report) -> None:
    by_layer = tables.loss_by_layer(dense_report.sensitivities)
    figure = charts.layer_loss_figure(by_layer, "int3_g64")
    assert len(figure.data) == 7 * 7
    visible = [trace for trace in figure.data if trace.visible]
    assert {trace.meta["series"] for trace in visible} == {"int3_g64"}
    assert [trace.meta["role"] for trace in visible] == list(dict.fromkeys(by_layer["role"]))
    rows = by_layer[(by_layer["series"] == "int3_g64") & (by_layer["role"] == "q_proj")]
    assert list(visible[0].y) == list(rows["loss"])


def test_worst_units_are_listed_worst_first(dense_report: Report) -> None:
    worst = tables.most_sensitive_units(dense_report.sensitivities, 5)
    figure = charts.worst_units_figure(worst, "int4_g64")
    (trace,) = [trace for trace in figure.data if trace.visible]
    assert len(trace.x) == 5
    assert list(trace.x) == sorted(trace.x, reverse=True)


def test_bars_add_up_to_the_plan(dense_report: Report) -> None:
    figure = charts.bytes_figure(tables.bytes_by_role(dense_report.plan))
    drawn_mib = sum(sum(trace.x) for trace in figure.data if trace.type == "bar")
    assert drawn_mib == pytest.approx(dense_report.headline.memory_bytes / tables.MIB)


def test_formats_of_the_same_colour_get_a_pattern(dense_report: Report) -> None:
    plan = dense_report.plan.assign(format=["nf4", "int4"] * 105 + ["int4"], bits_per_weight=4.25)
    first, second = (t for t in charts.bytes_figure(tables.bytes_by_role(plan)).data if t.type == "bar")
    assert first.marker.color == second.marker.color
    assert first.marker.pattern.shape is None
    assert second.marker.pattern.shape == "/"


def test_names_from_outside_cannot_make_links(dense_report: Report) -> None:
    plan = dense_report.plan.assign(role=HOSTILE, unit=HOSTILE, format=HOSTILE)
    sensitivities = dense_report.sensitivities.assign(role=HOSTILE, unit=HOSTILE)
    evaluations = dense_report.evaluations.assign(name=HOSTILE)
    report = replace(dense_report, plan=plan, sensitivities=sensitivities, evaluations=evaluations)
    points = tables.measured_points(report.evaluations)
    figures = [
        charts.plan_figure(tables.plan_grid(plan), tables.units_without_layer(plan)),
        charts.bytes_figure(tables.bytes_by_role(plan)),
        charts.frontier_figure(tables.frontier_curve(report.frontier), points),
        charts.prediction_figure(tables.prediction_check(report.evaluations)),
        charts.worst_units_figure(tables.most_sensitive_units(sensitivities, 5), "int4_g64"),
    ]
    for figure in figures:
        text = figure.to_json()
        assert "&lt;a href=" in text
        assert "<a href=" not in text
    lines = charts.layer_loss_figure(tables.loss_by_layer(sensitivities), "int4_g64")
    assert lines.data[0].name == "&lt;a href='https://example.com'&gt;x&lt;/a&gt;"


def test_figures_have_no_values_that_json_lacks(moe_report: Report) -> None:
    frontier = moe_report.frontier.assign(lower_bound=math.nan, shadow_price_per_mib=math.nan)
    points = tables.measured_points(moe_report.evaluations.assign(kl_low=math.nan, kl_high=math.nan))
    figure = charts.frontier_figure(tables.frontier_curve(frontier), points)
    decoded = json.loads(figure.to_json(), parse_constant=pytest.fail)
    assert set(decoded["data"][0]["y"]) == {None}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1e-4, 1.0], ["0.01", "0.1", "1"]),
        ([0.01, 0.9], ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"]),
        ([0.02, 0.04, None, -1.0], ["0.01", "0.015", "0.02", "0.03", "0.04", "0.05"]),
    ],
    ids=["four powers", "two powers", "half a power"],
)
def test_log_axis_has_as_many_labels_as_the_span_allows(values: list[float | None], expected: list[str]) -> None:
    axis = log_axis("loss", values)
    labels = axis["ticktext"]
    start = labels.index(expected[0])
    assert labels[start : start + len(expected)] == expected
    assert [float(label) for label in expected] == pytest.approx(axis["tickvals"][start : start + len(expected)])


def test_bits_are_coloured_on_a_log_scale() -> None:
    assert [bits_position(bits) for bits in (1, 2, 4, 16, 32)] == pytest.approx([0, 0, 1 / 3, 1, 1])
    colours = [bits_colour(bits + 0.25, LIGHT) for bits in (2, 3, 4, 5, 6, 8)]
    assert len(set(colours)) == 6


def test_palettes_name_the_same_colours() -> None:
    assert len(LIGHT.sequential) == len(DARK.sequential) == SEQUENTIAL_STEPS
    light, dark = ({entry.split(":")[0] for entry in css_variables(p).split("; ")} for p in (LIGHT, DARK))
    assert light == dark
    assert NAMED.accent == "var(--accent)"
    assert NAMED.sequential[3] == "var(--sequential-3)"
