"""The page about several reports: a row for each, links that lead there, and names that do no harm."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

from reports.html import write_html
from reports.index_page import HEADERS, write_index
from reports.report import Report
from reports.summary import write_summary

HOSTILE = ["=cmd()", "+1", "@x", "<script>alert(1)</script>", "javascript:alert(1)", "a b&c#d?e"]


def place(report: Report, directory: Path) -> Path:
    write_summary(report, directory)
    (directory / "report.html").write_text("a page")
    return directory


def read_rows(page: Path) -> list[list[str]]:
    body = page.read_text(encoding="utf-8").split("<tbody>")[1].split("</tbody>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", body, flags=re.DOTALL)
    return [[unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", row)] for row in rows]


def test_each_report_is_a_row_with_its_numbers(dense_report: Report, moe_report: Report, tmp_path: Path) -> None:
    folders = [place(dense_report, tmp_path / "dense"), place(replace(moe_report, model_name="moe"), tmp_path / "moe")]
    page = write_index(folders, tmp_path / "overview")
    rows = read_rows(page)
    assert [row[:2] for row in rows] == [["dense", "SmolLM2-135M-Instruct"], ["moe", "moe"]]
    headline = dense_report.headline
    cells = dict(zip(HEADERS, rows[0], strict=True))
    assert cells["Budget"] == headline.budget_text
    assert float(cells["Size (MiB)"]) == pytest.approx(headline.memory_bytes / 2**20, rel=5e-3)
    assert float(cells["KL"]) == pytest.approx(headline.measured_kl, rel=5e-3)
    assert headline.best_uniform_kl is not None
    times = headline.best_uniform_kl / headline.measured_kl
    assert float(cells["Times less than uniform"]) == pytest.approx(times, rel=5e-3)
    assert "2 plans of 2 models" in page.read_text(encoding="utf-8")


def test_sorting_is_by_the_whole_number_not_by_its_text(dense_report: Report, tmp_path: Path) -> None:
    page = write_index([place(dense_report, tmp_path / "a")], tmp_path)
    values = re.findall(r'data-value="([^"]*)"', page.read_text(encoding="utf-8"))
    assert float(values[0]) == dense_report.headline.memory_bytes / 2**20


@pytest.mark.parametrize("name", HOSTILE)
def test_links_lead_to_the_pages_whatever_their_folders_are_called(
    dense_report: Report, tmp_path: Path, name: str
) -> None:
    folder = name.replace("/", "_")
    place(dense_report, tmp_path / folder)
    page = write_index([tmp_path / folder], tmp_path)
    [link] = re.findall(r'<th scope="row"><a href="([^"]*)"', page.read_text(encoding="utf-8"))
    assert not re.match(r"[a-z]+:", link)
    assert (page.parent / unquote(unescape(link))).read_text() == "a page"


def test_links_leave_the_folder_of_the_index(dense_report: Report, tmp_path: Path) -> None:
    page = write_index([place(dense_report, tmp_path / "reports" / "a")], tmp_path / "overview" / "all")
    assert 'href="../../reports/a/report.html"' in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_models_stay_text(dense_report: Report, tmp_path: Path, name: str) -> None:
    report = replace(dense_report, model_name=name, headline=replace(dense_report.headline, budget_text=name))
    page = write_index([place(report, tmp_path / "a")], tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 1
    assert read_rows(page)[0][1] == name
    with (tmp_path / "index.csv").open(encoding="utf-8", newline="") as file:
        [row] = csv.DictReader(file)
    assert row["model"] == ("'" + name if name[0] in "=+@" else name)
    assert float(row["measured_kl"]) == report.headline.measured_kl


def test_the_page_loads_nothing(dense_report: Report, tmp_path: Path) -> None:
    text = write_index([place(dense_report, tmp_path / "a")], tmp_path).read_text(encoding="utf-8")
    assert "//" not in re.sub(r"^\s*//.*$", "", text.replace("<!DOCTYPE", ""), flags=re.MULTILINE)
    assert "default-src 'none'" in text


def test_no_reports_and_no_report_are_refused(dense_report: Report, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an index must have reports: got no directory"):
        write_index([], tmp_path)
    write_html(dense_report, tmp_path / "old" / "report.html")
    with pytest.raises(ValueError, match=r"must hold a summary.json .* got '.*old.*Write the report again"):
        write_index([tmp_path / "old"], tmp_path)
