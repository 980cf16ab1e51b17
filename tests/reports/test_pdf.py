"""The page of paper: complete as HTML, one sheet when a real Chromium prints it, clear words when there is none."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from reports import browser
from reports.browser import BROWSERS, PrintingFailed, find_browser, print_to_pdf
from reports.pdf import MOST_ROLES, render_one_page, write_pdf
from reports.report import Report

HOSTILE = "=cmd()</script><script>alert(1)</script>"
INSTALLED = any(shutil.which(name) for name in BROWSERS)
needs_browser = pytest.mark.skipif(not INSTALLED, reason="no Chromium is installed")


def count_pages(pdf: bytes) -> int:
    """Pages of a PDF by its page objects, which Chromium does not compress."""
    return len(re.findall(rb"/Type\s*/Page\b", pdf))


def test_the_page_has_the_findings_both_charts_and_the_roles(dense_report: Report) -> None:
    page = render_one_page(dense_report)
    assert dense_report.headline.verdict in page
    figures = json.loads(page.split('id="chart-data">')[1].split("</script>")[0])
    assert list(figures) == ["frontier", "plan"]
    for role in set(dense_report.plan["role"]):
        assert f'<th scope="row">{role}</th>' in page


def test_many_roles_are_cut_and_counted(dense_report: Report) -> None:
    plan = dense_report.plan
    many = plan.assign(role=[f"role {i % 40}" for i in range(len(plan))])
    page = render_one_page(replace(dense_report, plan=many))
    assert page.count('<th scope="row">') == MOST_ROLES
    assert f"{40 - MOST_ROLES} more roles, smaller." in page


def test_hostile_names_stay_text(dense_report: Report) -> None:
    report = replace(
        dense_report,
        title=HOSTILE,
        model_name=HOSTILE,
        headline=replace(dense_report.headline, verdict=HOSTILE, budget_text=HOSTILE),
        plan=dense_report.plan.assign(role=HOSTILE, format=HOSTILE, unit=HOSTILE),
    )
    assert render_one_page(report).count("<script") == 3


@needs_browser
@pytest.mark.parametrize(("layers", "experts"), [(30, 0), (61, 4)])
def test_it_is_one_sheet(make_report: Callable[..., Report], tmp_path: Path, layers: int, experts: int) -> None:
    path = write_pdf(make_report(layers=layers, experts=experts), tmp_path / "new" / "report.pdf")
    content = path.read_bytes()
    assert content.startswith(b"%PDF")
    assert count_pages(content) == 1
    # Charts are drawn, not left out: the text alone takes a fraction of this.
    assert len(content) > 50_000
    assert list(path.parent.iterdir()) == [path]


def test_without_a_browser_the_message_says_what_to_install(
    dense_report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ModuleNotFoundError, match=r"printed by Chromium: got none of chromium, .* on the PATH. Install"
    ):
        write_pdf(dense_report, tmp_path / "report.pdf")
    assert not (tmp_path / "report.pdf").exists()


def place_browser(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a program that is found as a browser."""
    directory.mkdir()
    program = directory / "google-chrome"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


def test_browsers_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_browser(tmp_path / "bin", "exit 0", monkeypatch)
    assert find_browser() == str(tmp_path / "bin" / "google-chrome")


def test_a_browser_that_fails_is_named_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place_browser(tmp_path / "bin", "echo no display >&2; exit 3", monkeypatch)
    with pytest.raises(
        PrintingFailed, match=r"google-chrome' wrote nothing \(exit code 3, no display\). Leave the PDF"
    ):
        print_to_pdf("<p>", tmp_path / "out" / "a.pdf")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_browser_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / BROWSERS[0]
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(browser, "MOST_SECONDS", 0.2)
    with pytest.raises(PrintingFailed, match=r"wrote nothing \(stopped after 0.2 s\)"):
        print_to_pdf("<p>", tmp_path / "a.pdf")
