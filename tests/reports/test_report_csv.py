"""The CSV files, read back."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from reports.csv_files import csv_text, neutralise, write_csv
from reports.report import COLUMNS, OPTIONAL_TABLES, Report

TABLES = [*(name for name in COLUMNS if name not in OPTIONAL_TABLES), "provenance"]


def test_files_hold_the_tables(dense_report: Report, tmp_path: Path) -> None:
    paths = write_csv(dense_report, tmp_path / "tables")
    assert [path.name for path in paths] == [f"{name}.csv" for name in TABLES]
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == sorted(path.name for path in paths)
    for name in TABLES[:-1]:
        table = getattr(dense_report, name)
        whole = {c: "Int64" for c in table.columns if c.endswith("_index")}
        read = pd.read_csv(tmp_path / "tables" / f"{name}.csv", dtype=whole)
        pd.testing.assert_frame_equal(read, table, check_dtype=False)
    provenance = pd.read_csv(tmp_path / "tables" / "provenance.csv")
    assert dict(zip(provenance["name"], provenance["value"], strict=True)) == dense_report.provenance


def test_a_mixture_has_the_files_of_its_experts(expert_report: Report, tmp_path: Path) -> None:
    paths = write_csv(expert_report, tmp_path)
    assert {path.name for path in paths} == {f"{name}.csv" for name in [*COLUMNS, "provenance"]}
    assert len(pd.read_csv(tmp_path / "experts.csv")) == 64


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "  =", "\uff1d", "\uff20"])
def test_text_that_a_spreadsheet_would_run_is_neutralised(dense_report: Report, tmp_path: Path, start: str) -> None:
    formula = f"{start}HYPERLINK(1)"
    report = replace(
        dense_report,
        evaluations=dense_report.evaluations.assign(name=formula),
        provenance={formula: formula},
    )
    write_csv(report, tmp_path)
    for name in ("evaluations", "provenance"):
        with (tmp_path / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert rows[0]["name"] == f"'{formula}"
    assert rows[0]["value"] == f"'{formula}"


def test_numbers_stay_numbers() -> None:
    table = pd.DataFrame({"x": [-1.5, 0.1], "-y": pd.array([-2, None], dtype="Int64"), "z": [-1, "-1"]})
    assert csv_text(table) == "x,'-y,z\r\n-1.5,-2,-1\r\n0.1,,'-1\r\n"


@pytest.mark.parametrize("value", ["layers.0.q_proj", "", "a=b", 3, None])
def test_harmless_cells_are_left_alone(value: object) -> None:
    assert neutralise(value) == value


def test_stray_bytes_in_a_name_do_not_stop_the_writing(dense_report: Report, tmp_path: Path) -> None:
    write_csv(replace(dense_report, provenance={"Model": "model\udcff"}), tmp_path)
    assert (tmp_path / "provenance.csv").read_bytes() == b"name,value\r\nModel,model\\udcff\r\n"
