"""Summaries come back as they were written; what is damaged is named."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from reports.report import Report
from reports.summary import SUMMARY_FILE, load_summary, write_summary


def test_round_trip(dense_report: Report, tmp_path: Path) -> None:
    path = write_summary(dense_report, tmp_path)
    assert path == tmp_path / SUMMARY_FILE
    summary = load_summary(tmp_path)
    assert summary.headline == dense_report.headline
    assert (summary.title, summary.model_name) == (dense_report.title, dense_report.model_name)
    assert summary.provenance == dense_report.provenance


def test_numbers_that_json_lacks_come_back(dense_report: Report, tmp_path: Path) -> None:
    headline = replace(
        dense_report.headline,
        relative_gap=math.inf,
        lower_bound=-math.inf,
        predicted_kl=math.nan,
        best_uniform_name=None,
        best_uniform_kl=None,
    )
    path = write_summary(replace(dense_report, headline=headline), tmp_path)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    found = load_summary(tmp_path).headline
    assert math.isnan(found.predicted_kl)
    assert replace(found, predicted_kl=0.0) == replace(headline, predicted_kl=0.0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"schema_version": 7}, "schema_version must be 1, got 7"),
        ({"headline": None}, "AttributeError"),
        ({"headline": {"verdict": "good"}}, "TypeError: .*missing"),
        ({"title": "gone"}, "KeyError: 'title'"),
    ],
    ids=["version", "no headline", "half a headline", "no title"],
)
def test_damaged_summaries_are_named(
    dense_report: Report, tmp_path: Path, changes: dict[str, object], match: str
) -> None:
    path = write_summary(dense_report, tmp_path)
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in document.items() if value != "gone"}))
    with pytest.raises(ValueError, match=rf"must hold a summary.json of this version: got .*{match}.*again"):
        load_summary(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", None])
def test_what_is_no_summary(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / SUMMARY_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"must hold a summary.json of this version: got '.*'.*Write the report again"):
        load_summary(tmp_path)
