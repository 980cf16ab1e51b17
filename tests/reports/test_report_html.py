"""The page, parsed back: it stands alone, says what was found, and cannot be made to do harm."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from reports.csv_files import write_csv
from reports.html import figures_json, render_html, script_safe, write_html
from reports.page_parts import Chart, make_download
from reports.report import Report
from reports.sections import build_sections

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
SECTIONS = [
    "comparison",
    "frontier",
    "plan",
    "formats",
    "bytes",
    "sensitivities",
    "predictions",
    "provenance",
    "glossary",
]
VOID = {"meta", "link", "img", "br", "hr", "input"}


@dataclass
class Page(HTMLParser):
    """Elements, the text of each, and the scripts of a page."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    open_tags: list[str] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open_tags[-1] if self.open_tags else "", data))

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def script(self, index: int) -> str:
        return [text for tag, text in self.texts if tag == "script"][index]

    @property
    def words(self) -> str:
        """All visible text, blanks collapsed."""
        parts = [text for tag, text in self.texts if tag not in ("script", "style")]
        return re.sub(r"\s+", " ", " ".join(parts))


def all_charts(report: Report) -> list[Chart]:
    return [chart for section in build_sections(report) for chart in section.charts]


def parse(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open_tags == []
    return page


@pytest.fixture(scope="module")
def source(dense_report: Report) -> str:
    return render_html(dense_report)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return parse(source)


def test_page_loads_nothing(page: Page, source: str) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "poster", "data", "background", "style"):
            value = attributes.get(name) or ""
            assert "//" not in value or value.startswith("data:"), f"<{tag} {name}={value[:60]}>"
    assert [attributes.get("src") for attributes in page.find("script")] == [None, None, None]
    style = "".join(text for tag, text in page.texts if tag == "style")
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in source


def test_plotly_is_there_once(source: str) -> None:
    assert source.count("* plotly.js v") == 1


def test_each_section_is_there_and_reachable(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert [attributes.get("id") for attributes in page.find("section")][-len(SECTIONS) :] == SECTIONS
    assert len(ids) == len(set(ids))
    for attributes in page.find("a"):
        href = attributes["href"] or ""
        assert href.startswith("data:text/csv") or href.removeprefix("#") in ids


def test_first_screen_has_the_findings(page: Page, dense_report: Report) -> None:
    headline, words = dense_report.headline, page.words
    assert headline.verdict in words
    assert "Proven within 0.42 % of the best possible under its own predictions." in words
    assert f"{headline.memory_bytes / 2**20:.1f} MiB" in words
    assert f"{headline.reference_memory_bytes / 2**20:.0f} MiB" in words
    assert f"[{headline.measured_kl_low:.3f}, {headline.measured_kl_high:.3f}]" in words
    assert headline.budget_text in words
    assert dense_report.notes[0] in words


def test_provenance_and_glossary_are_complete(page: Page, dense_report: Report) -> None:
    for name, value in dense_report.provenance.items():
        assert name in page.words
        assert value in page.words
    for word in ("Nat", "Perplexity", "Shadow price", "Unit"):
        assert ("dt", word) in page.texts


def test_each_chart_has_data_a_description_and_a_table_or_numbers(page: Page) -> None:
    charts = json.loads(page.script(1))
    holders = [attributes for _, attributes in page.tags if "data-chart" in attributes]
    assert [holder["data-chart"] for holder in holders] == list(charts)
    assert len(charts) == 7
    for holder in holders:
        assert holder["role"] == "img"
        assert len(holder["aria-label"] or "") > 20
    for shapes in charts.values():
        assert all(shapes[shape]["data"] for shape in ("wide", "narrow"))
    assert len(page.find("table")) == 7


def test_named_colours_of_the_charts_are_in_the_style_sheet(page: Page) -> None:
    style = "".join(text for tag, text in page.texts if tag == "style")
    light, dark = (set(re.findall(r"(--[a-z0-9-]+): ?[#r]", part)) for part in style.split("@media", 1))
    named = set(re.findall(r"var\((--[a-z0-9-]+)\)", page.script(1) + style))
    assert named <= light
    assert light == dark


def test_menus_offer_the_formats_and_roles_of_the_traces(page: Page) -> None:
    charts = json.loads(page.script(1))
    traces = charts["layers"]["wide"]["data"]
    options = [attributes["value"] for attributes in page.find("option")]
    assert set(options) == {trace["meta"][axis] for trace in traces for axis in ("series", "role")} | {""}
    selected = [attributes["value"] for attributes in page.find("option") if "selected" in attributes]
    visible = {trace["meta"]["series"] for trace in traces if trace["visible"]}
    assert selected == [*visible, ""]
    assert [attributes["data-axis"] for attributes in page.find("select")] == ["series", "role"]


def test_downloads_are_the_tables(page: Page, dense_report: Report) -> None:
    links = {a["download"]: a["href"] or "" for a in page.find("a") if "download" in a}
    assert set(links) == {"evaluations.csv", "frontier.csv", "plan.csv", "sensitivities.csv"}
    content = base64.b64decode(links["plan.csv"].split(",", 1)[1])
    plan = pd.read_csv(io.BytesIO(content), dtype={"layer_index": "Int64", "expert_index": "Int64"})
    pd.testing.assert_frame_equal(plan, dense_report.plan, check_dtype=False)


def test_large_downloads_are_left_out() -> None:
    download = make_download("big.csv", pd.DataFrame({"x": range(200_000)}))
    assert (download.href, download.rows) == (None, 200_000)


def test_hostile_names_stay_text(dense_report: Report) -> None:
    sensitivities = dense_report.sensitivities.assign(unit=dense_report.sensitivities["unit"] + HOSTILE, metric=HOSTILE)
    report = replace(
        dense_report,
        title=HOSTILE,
        model_name=HOSTILE,
        headline=replace(dense_report.headline, verdict=HOSTILE, best_uniform_name=HOSTILE),
        plan=dense_report.plan.assign(unit=HOSTILE, format=HOSTILE, role=dense_report.plan["role"] + HOSTILE),
        evaluations=dense_report.evaluations.assign(name=HOSTILE),
        sensitivities=sensitivities,
        provenance={HOSTILE: HOSTILE},
        notes=(HOSTILE,),
    )
    page = parse(render_html(report))
    assert len(page.find("script")) == 3
    assert page.find("img") == []
    assert page.words.count(HOSTILE) > 10
    assert HOSTILE.replace("<", "&lt;").replace(">", "&gt;") in json.dumps(json.loads(page.script(1)))


@pytest.mark.parametrize("name", ["=cmd()", "+1", "@x", "<script>alert(1)</script>", "{{ 7 * 7 }}", "{% raw %}"])
def test_names_of_models_and_units_are_harmless(expert_report: Report, tmp_path: Path, name: str) -> None:
    """On the page as text, in the figures escaped, in its CSV files behind an apostrophe where they start a formula."""
    report = replace(
        expert_report,
        model_name=name,
        plan=expert_report.plan.assign(unit=name),
        sensitivities=expert_report.sensitivities.assign(unit=name),
        provenance={"model": name},
    )
    page = parse(render_html(report))
    assert len(page.find("script")) == 3
    assert ("p", name) in page.texts
    assert page.words.count(name) > 2
    assert "<script" not in page.script(1)
    write_csv(report, tmp_path)
    shown = f"'{name}" if name[0] in "=+@" else name
    for file, column in (("plan.csv", "unit"), ("sensitivities.csv", "unit"), ("provenance.csv", "value")):
        assert set(pd.read_csv(tmp_path / file, dtype=str)[column]) == {shown}
    assert pd.read_csv(tmp_path / "plan.csv")["memory_bytes"].tolist() == report.plan["memory_bytes"].tolist()


def test_figures_cannot_end_their_script(dense_report: Report) -> None:
    report = replace(dense_report, plan=dense_report.plan.assign(format="<!--<script>\u2028"))
    text = figures_json(all_charts(report))
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text)["bytes"]["wide"]["data"][0]["name"] == "&lt;!--&lt;script&gt;\u2028"


def test_scripts_are_made_safe_to_inline() -> None:
    assert script_safe("a='</script>';b='<!--'") == "a='\\x3c/script>';b='\\x3c!--'"


@pytest.mark.parametrize(("layers", "experts"), [(4, 16), (2, 64), (1, 1), (61, 0)])
def test_models_of_any_shape_have_a_page(make_report: Callable[..., Report], layers: int, experts: int) -> None:
    report = make_report(layers=layers, experts=experts)
    charts = json.loads(figures_json(all_charts(report)))
    strip, cells = charts["plan"]["wide"]["data"]
    assert len(cells["x"]) == layers
    assert len(cells["y"]) == 7
    assert len(strip["y"]) == 1


def test_long_tables_are_cut_and_say_so(moe_report: Report) -> None:
    page = parse(render_html(moe_report))
    # 4 x (4 + 3 x 16) units and the embedding are 209 rows: not cut.
    assert "more rows not shown" not in page.words
    double = moe_report.sensitivities.assign(unit=moe_report.sensitivities["unit"] + "'")
    both = pd.concat([moe_report.sensitivities, double], ignore_index=True)
    page = parse(render_html(replace(moe_report, sensitivities=both)))
    assert "168 more rows not shown here." in page.words


def test_sections_without_data_are_left_out(dense_report: Report) -> None:
    report = replace(
        dense_report,
        frontier=dense_report.frontier.head(0),
        sensitivities=dense_report.sensitivities.head(0),
        evaluations=dense_report.evaluations.assign(predicted_kl=float("nan")),
        notes=(),
    )
    page = parse(render_html(report))
    assert list(json.loads(page.script(1))) == ["frontier", "plan", "formats", "bytes"]
    assert "Worth knowing" not in page.words


def test_losses_that_the_scale_cannot_show_are_counted(dense_report: Report) -> None:
    table = dense_report.sensitivities.copy()
    table.loc[table["format"].eq("int8_g64") & table["layer_index"].eq(5), "loss"] = -1e-6
    sections = {section.key: section for section in build_sections(replace(dense_report, sensitivities=table))}
    assert "7 losses at or below zero" in " ".join(sections["sensitivities"].paragraphs)


def test_writing_replaces_the_old_page_and_leaves_nothing_else(dense_report: Report, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "report.html"
    assert write_html(dense_report, path) == path
    first = path.read_text(encoding="utf-8")
    write_html(replace(dense_report, title="Another"), str(path))
    assert "<title>Another</title>" in path.read_text(encoding="utf-8")
    assert "<title>Another</title>" not in first
    assert list(path.parent.iterdir()) == [path]


def test_failed_writing_leaves_no_temporary_file(dense_report: Report, tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OSError, match="report.html"):
        write_html(dense_report, tmp_path / "report.html")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
