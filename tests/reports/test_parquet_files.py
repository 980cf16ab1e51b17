"""Parquet files, read back with pyarrow; without it a message says what to install."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from reports.csv_files import named_tables
from reports.parquet_files import write_parquet
from reports.report import Report

ROOT = Path(__file__).parents[2]


def test_files_hold_the_tables_with_their_types(expert_report: Report, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    paths = write_parquet(expert_report, tmp_path / "tables")
    assert [path.stem for path in paths] == list(named_tables(expert_report))
    for path in paths:
        expected = named_tables(expert_report)[path.stem]
        pd.testing.assert_frame_equal(pd.read_parquet(path, engine="pyarrow"), expected, check_dtype=False)
    plan = pd.read_parquet(tmp_path / "tables" / "plan.parquet", engine="pyarrow")
    assert str(plan["layer_index"].dtype) == "Int64", "missing layers leave the others whole numbers"
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == sorted(path.name for path in paths)


def test_stray_bytes_in_a_name_do_not_stop_the_writing(dense_report: Report, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    write_parquet(replace(dense_report, provenance={"Model": "model\udcff"}), tmp_path)
    assert pd.read_parquet(tmp_path / "provenance.parquet")["value"].tolist() == ["model\\udcff"]


def test_without_pyarrow_the_message_says_what_to_install() -> None:
    """In a process of its own, whose import path leads nowhere but to the project and the standard library."""
    code = (
        "import sys, importlib.abc\n"
        "class Nothing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.split('.')[0] == 'pyarrow':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Nothing())\n"
        "from reports.parquet_files import import_pyarrow\n"
        "import_pyarrow()\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "Parquet files need pyarrow: it is not installed. Run: pip install 'bitplan[parquet]'." in finished.stderr
