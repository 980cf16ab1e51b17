"""Two plans side by side: what differs, who is better where, and names that do no harm."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from reports import comparison_charts, comparison_tables
from reports.comparison import PART_COLUMNS, Comparison, Side
from reports.comparison_page import build_comparison_sections, render_comparison, verdict, write_comparison
from reports.report import Report

FIRST = Side(
    name="a",
    budget_text="memory <= 70 MiB",
    memory_bytes=70.0 * 2**20,
    bits_per_weight=4.5,
    predicted_kl=0.10,
    measured_kl=0.12,
    measured_kl_low=0.11,
    measured_kl_high=0.13,
)
SECOND = replace(
    FIRST,
    name="b",
    memory_bytes=60.0 * 2**20,
    bits_per_weight=3.9,
    predicted_kl=0.20,
    measured_kl=0.24,
    measured_kl_low=0.22,
    measured_kl_high=0.26,
)
HOSTILE = ["=cmd()", "+1", "@x", "</script><script>alert(1)</script>"]


@pytest.fixture(scope="module")
def comparison(dense_report: Report) -> Comparison:
    """The second plan has half the bytes and thrice the loss in v_proj, the reverse in down_proj of one layer."""
    plan = dense_report.plan
    parts = plan[["unit", "role", "layer_index", "expert_index"]].assign(
        first_format=plan["format"],
        second_format=plan["format"],
        first_bits=plan["bits_per_weight"],
        second_bits=plan["bits_per_weight"],
        first_bytes=plan["memory_bytes"],
        second_bytes=plan["memory_bytes"],
        first_loss=plan["predicted_loss"],
        second_loss=plan["predicted_loss"],
    )
    worse = parts["role"] == "v_proj"
    parts.loc[worse, "second_format"] = "int2_g64"
    parts.loc[worse, ["second_bits", "second_bytes"]] /= 2
    parts.loc[worse, "second_loss"] *= 3
    better = (parts["role"] == "down_proj") & (parts["layer_index"] == 7)
    parts.loc[better, "second_format"] = "another"
    parts.loc[better, "second_loss"] /= 2
    return Comparison(
        title="a beside b",
        model_name="model",
        first=FIRST,
        second=SECOND,
        parts=parts,
        loss_unit="nats/token",
        frontier=dense_report.frontier,
        measured_on="evaluation text",
        notes=("A note.",),
    )


def test_units_that_differ_are_listed_by_how_much(comparison: Comparison) -> None:
    table = comparison_tables.differing_parts(comparison.parts)
    assert len(table) == 31
    assert set(table["role"]) == {"v_proj", "down_proj"}
    assert list(table["loss_change"].abs()) == sorted(table["loss_change"].abs(), reverse=True)
    row = table[table["role"] == "down_proj"].iloc[0]
    assert row["bytes_change"] == 0
    assert row["loss_change"] == pytest.approx(-row["first_loss"] / 2)


def test_the_better_plan_of_each_role_is_named(comparison: Comparison) -> None:
    by_role = comparison_tables.role_comparison(comparison.parts).set_index("role")
    assert by_role.loc["v_proj", "better"] == comparison_tables.EITHER
    assert by_role.loc["down_proj", "better"] == comparison_tables.SECOND
    assert by_role.loc["q_proj", "better"] == comparison_tables.SAME
    assert (by_role.loc["v_proj", "units"], by_role.loc["v_proj", "differing"]) == (30, 30)
    swapped = comparison.parts.rename(
        columns=lambda name: str(name).replace("first", "x").replace("second", "first").replace("x_", "second_")
    )
    back = comparison_tables.role_comparison(swapped).set_index("role")
    assert back.loc["down_proj", "better"] == comparison_tables.FIRST


def test_sums_of_roles_are_those_of_the_units(comparison: Comparison) -> None:
    by_role = comparison_tables.role_comparison(comparison.parts)
    for column in ("first_bytes", "second_bytes", "first_loss", "second_loss"):
        assert by_role[column].sum() == pytest.approx(comparison.parts[column].sum())


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
def test_the_heat_map_shows_the_change_of_bits(comparison: Comparison, narrow: bool) -> None:
    grid = comparison_tables.change_grid(comparison.parts)
    (cells,) = comparison_charts.change_figure(grid, narrow=narrow).data
    roles = list(cells.x if narrow else cells.y)
    v_proj, q_proj = roles.index("v_proj"), roles.index("q_proj")
    rows = comparison.parts.query("role == 'v_proj' and layer_index == 3").iloc[0]
    change = cells.z[3][v_proj] if narrow else cells.z[v_proj][3]
    assert change == pytest.approx(rows["second_bits"] - rows["first_bits"])
    assert (cells.z[3][q_proj] if narrow else cells.z[q_proj][3]) == 0


def test_both_plans_are_on_the_frontier(comparison: Comparison) -> None:
    traces = {trace.name: trace for trace in comparison_charts.both_figure(comparison).data}
    assert list(traces["a, measured"].y) == [0.12]
    assert list(traces["b, predicted"].y) == [0.20]
    assert traces["b, measured"].error_y.arrayminus[0] == pytest.approx(0.02)
    low, high = (10**end for end in comparison_charts.both_figure(comparison).layout.yaxis.range)
    assert low < 0.10 < 0.24 < high


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({}, {}, "a loses 0.120 nats per token (measured), 2.0 times less than b with 0.240. b is smaller by 10.0 MiB"),
        ({}, {"measured_kl_low": 0.12}, "As measured, the two cannot be told apart: a loses 0.120, b 0.240"),
        ({"measured_kl": None}, {}, "a loses 0.100 nats per token (predicted), 2.0 times less than b with 0.200."),
        (
            {"measured_kl": None, "predicted_kl": None},
            {"memory_bytes": FIRST.memory_bytes},
            "not known in the same unit. Both are of the same size.",
        ),
    ],
    ids=["measured", "overlap", "predicted", "unknown"],
)
def test_the_verdict_says_what_is_known(
    comparison: Comparison, first: dict[str, float | None], second: dict[str, float | None], said: str
) -> None:
    assert said in verdict(replace(comparison, first=replace(FIRST, **first), second=replace(SECOND, **second)))


def test_every_chart_has_a_table(comparison: Comparison) -> None:
    for section in build_comparison_sections(comparison):
        assert section.listing is not None and section.listing.rows
    figures = json.loads(render_comparison(comparison).split('id="chart-data">')[1].split("</script>")[0])
    assert set(figures) == {"both", "changes", "role-bytes", "role-loss"}


def test_equal_plans_have_a_page(comparison: Comparison) -> None:
    parts = comparison.parts.assign(second_format=comparison.parts["first_format"])
    page = render_comparison(replace(comparison, parts=parts, frontier=comparison.frontier.head(0)))
    assert "0 units of 211 have another format" in page


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_text_on_the_page_and_in_the_files(comparison: Comparison, tmp_path: Path, name: str) -> None:
    hostile = replace(
        comparison,
        title=name,
        model_name=name,
        first=replace(FIRST, name=name, budget_text=name),
        parts=comparison.parts.assign(unit=name, first_format=name, role=name),
        notes=(name,),
    )
    page = write_comparison(hostile, tmp_path).read_text(encoding="utf-8")
    assert page.count("<script") == 3
    for file in ("units.csv", "roles.csv"):
        with (tmp_path / file).open(encoding="utf-8", newline="") as opened:
            cells = [cell for row in csv.DictReader(opened) for cell in row.values()]
        assert not [cell for cell in cells if cell[:1] in "=+@" and cell]
        assert any(name in cell for cell in cells)


def test_files_hold_the_tables(comparison: Comparison, tmp_path: Path) -> None:
    page = write_comparison(comparison, tmp_path)
    assert page.name == "comparison.html"
    units = pd.read_csv(tmp_path / "units.csv")
    assert list(units.columns) == list(PART_COLUMNS)
    assert units["second_loss"].sum() == pytest.approx(comparison.parts["second_loss"].sum())
    body = re.sub(r"<script>.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "https:" not in body and "default-src 'none'" in body


def test_two_plans_of_one_name_are_refused(comparison: Comparison) -> None:
    with pytest.raises(ValueError, match="must have names of their own: got 'a' twice"):
        replace(comparison, second=replace(SECOND, name="a"))


def test_parts_are_checked(comparison: Comparison) -> None:
    with pytest.raises(ValueError, match="parts must have the columns .*: got no second_loss"):
        replace(comparison, parts=comparison.parts.drop(columns="second_loss"))
    with pytest.raises(ValueError, match="parts.first_loss must be known in every row"):
        replace(comparison, parts=comparison.parts.assign(first_loss=math.nan))
