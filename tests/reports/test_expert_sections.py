"""The page's part about experts and rules: each chart shows its table, each sentence its numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from reports import expert_charts, expert_tables
from reports.html import figures_json
from reports.palettes import bits_position
from reports.report import Report
from reports.sections import build_sections

HOSTILE = "=cmd()<script>"


def test_sections_of_a_mixture_are_there_with_tables(expert_report: Report) -> None:
    sections = {section.key: section for section in build_sections(expert_report)}
    assert {"rules", "experts", "affinity"} <= set(sections)
    for key in ("rules", "experts", "affinity"):
        assert sections[key].charts and sections[key].listing and sections[key].download
    assert len(sections["experts"].listing.rows) == 64  # type: ignore[union-attr]


def test_sections_of_a_dense_model_leave_experts_out(dense_report: Report) -> None:
    assert not {"rules", "experts", "affinity"} & {section.key for section in build_sections(dense_report)}


@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
@pytest.mark.parametrize("column", ["frequency", "bits_per_weight"])
def test_each_cell_is_its_expert(expert_report: Report, column: str, narrow: bool) -> None:
    (cells,) = expert_charts.experts_figure(expert_report.experts, column, narrow=narrow).data
    for row in expert_report.experts.to_dict("records"):
        layer, expert = row["layer_index"], row["expert_index"]
        value = cells.z[expert][layer] if narrow else cells.z[layer][expert]
        assert value == (row[column] if column == "frequency" else bits_position(row[column]))


def test_cells_without_an_expert_say_nothing(expert_report: Report) -> None:
    (cells,) = expert_charts.experts_figure(expert_report.experts.drop(index=5), "frequency").data
    assert (cells.z[0][5], cells.text[0][5]) == (None, "")


def test_the_menu_chooses_the_layer_of_the_affinity(expert_report: Report) -> None:
    [section] = [section for section in build_sections(expert_report) if section.key == "affinity"]
    traces = section.charts[0].wide.data
    assert {trace.meta["layer"] for trace in traces} == {value for value, _ in section.menus[0].options}
    assert {trace.meta["layer"] for trace in traces if trace.visible} == {section.menus[0].selected}
    overlaps = next(trace for trace in traces if trace.type == "heatmap" and trace.meta["layer"] == "1")
    matrix = expert_tables.overlap_matrix(expert_report, 1).to_numpy()
    assert overlaps.z[3][2] == matrix[3][2]
    assert overlaps.z[3][3] is None


def test_the_price_of_an_engines_rule_is_said_against_free_experts(expert_report: Report) -> None:
    [section] = [section for section in build_sections(expert_report) if section.key == "rules"]
    said = " ".join(section.paragraphs)
    assert "“All rules of an engine” is predicted to lose 0.0300 nats per token (20 %) more than “Formats of" in said
    assert "0.0800 nats per token (80 %) more than “Every unit by itself”" in said
    bars = section.charts[0].wide.data[0]
    assert list(bars.x) == [0.10, 0.12, 0.15, 0.18]
    assert "80.0 % more" in bars.text[3]


def test_a_rule_that_nothing_keeps_is_drawn_without_a_price(expert_report: Report) -> None:
    table = expert_report.rule_prices.assign(predicted_loss=[0.1, 0.12, 0.15, None])
    [section] = [s for s in build_sections(replace(expert_report, rule_prices=table)) if s.key == "rules"]
    assert "not possible" in section.charts[0].wide.data[0].text[3]
    assert "predicted to lose" not in " ".join(section.paragraphs)


def test_hostile_names_in_rules_and_formats_stay_text(expert_report: Report) -> None:
    report = replace(
        expert_report,
        rule_prices=expert_report.rule_prices.assign(
            rule=HOSTILE + expert_report.rule_prices["rule"], against=HOSTILE + expert_report.rule_prices["against"]
        ),
        experts=expert_report.experts.assign(formats=HOSTILE),
    )
    text = figures_json([chart for section in build_sections(report) for chart in section.charts])
    assert "<script" not in text
    assert "&lt;script&gt;" in json.dumps(json.loads(text))
