"""What a report refuses, and that importing the package is light."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import reports
from reports.report import COLUMNS, Report


@pytest.mark.parametrize("table_name", COLUMNS)
def test_missing_columns_are_named(dense_report: Report, table_name: str) -> None:
    table = getattr(dense_report, table_name)
    first, last = table.columns[0], table.columns[-1]
    changed = table.drop(columns=[first, last])
    with pytest.raises(ValueError, match=f"{table_name} must have the columns .* got no .*") as caught:
        replace(dense_report, **{table_name: changed})
    named = str(caught.value).split("got no ")[1]
    assert first in named
    assert last in named


@pytest.mark.parametrize(
    ("table_name", "column", "dtype", "hint"),
    [
        ("plan", "layer_index", "float64", "astype\\('Int64'\\)"),
        ("plan", "memory_bytes", "str", "pd.to_numeric"),
        ("plan", "format", "category", "astype\\('str'\\)"),
        ("evaluations", "shipped", "int64", "astype\\(bool\\)"),
        ("sensitivities", "loss", "bool", "pd.to_numeric"),
    ],
)
def test_columns_of_another_kind_are_refused(
    dense_report: Report, table_name: str, column: str, dtype: str, hint: str
) -> None:
    changed = getattr(dense_report, table_name).astype({column: dtype})
    with pytest.raises(ValueError, match=f"{table_name}.{column} must be of kind .* Use {hint}"):
        replace(dense_report, **{table_name: changed})


def test_missing_value_in_a_required_column_is_located(dense_report: Report) -> None:
    plan = dense_report.plan.copy()
    plan.loc[3, "memory_bytes"] = float("nan")
    with pytest.raises(ValueError, match="plan.memory_bytes must be known .* row 3"):
        replace(dense_report, plan=plan)


def test_plan_without_units_is_refused(dense_report: Report) -> None:
    with pytest.raises(ValueError, match="at least one unit"):
        replace(dense_report, plan=dense_report.plan.head(0))


def test_unknown_kind_of_evaluation_is_refused(dense_report: Report) -> None:
    evaluations = dense_report.evaluations.replace({"kind": {"uniform": "baseline"}})
    with pytest.raises(ValueError, match="one of reference, plan, uniform: got baseline"):
        replace(dense_report, evaluations=evaluations)


@pytest.mark.parametrize(("shipped", "found"), [(False, "none"), (True, "reference, fisher_diagonal")])
def test_exactly_one_evaluation_is_shipped(dense_report: Report, shipped: bool, found: str) -> None:
    with pytest.raises(ValueError, match=f"exactly one evaluation must be shipped: got .* \\({found}"):
        replace(dense_report, evaluations=dense_report.evaluations.assign(shipped=shipped))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"measured_kl": float("nan")}, "every headline number must be known: got measured_kl=nan"),
        ({"reference_memory_bytes": 0.0}, "reference_memory_bytes must be positive"),
        ({"relative_gap": -0.1}, "relative_gap must be 0 or more: got relative_gap=-0.1"),
        ({"best_uniform_kl": None}, "best_uniform_name and best_uniform_kl must be given together"),
    ],
    ids=["nan", "size", "gap", "uniform"],
)
def test_headline_is_checked(dense_report: Report, changes: dict[str, float | None], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(dense_report.headline, **changes)


@pytest.mark.parametrize("changes", [{"factor": 0.0}, {"error_factor": 0.9}])
def test_calibration_is_checked(expert_report: Report, changes: dict[str, float]) -> None:
    assert expert_report.calibration is not None
    with pytest.raises(ValueError, match=r"factor must be positive and error_factor 1 or more: got factor="):
        replace(expert_report.calibration, **changes)


def test_rules_are_compared_with_rules_of_the_table(expert_report: Report) -> None:
    table = expert_report.rule_prices.assign(against="another")
    with pytest.raises(ValueError, match=r"against must name rules of the table: got another, known are Every unit"):
        replace(expert_report, rule_prices=table)


def test_unknown_name_of_the_package_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'write_docx'. It has Calibration, Headline, Report"):
        _ = reports.write_docx


def test_table_of_contents_is_complete() -> None:
    assert set(reports.__all__) <= set(dir(reports))
    assert [getattr(reports, name).__name__ for name in reports.__all__] == reports.__all__


def test_importing_the_package_loads_no_heavy_library() -> None:
    root = Path(reports.__file__).parent.parent
    code = (
        "import sys; import reports; "
        "print([name for name in ('pandas', 'plotly', 'jinja2', 'torch') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
