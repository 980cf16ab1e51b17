"""The command ``bitplan report``: one job at a time, files where they are asked for, clear words where it cannot."""

import json
from pathlib import Path

import pytest

import allocator
from allocator.budget import Budget
from allocator.cli import FAILURE, USAGE, run
from allocator.plan_files import save_plan
from allocator.store import Store
from sensitivity.profile import SensitivityProfile

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def plan_paths(
    tiny_profile: SensitivityProfile, tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Path]:
    monkeypatch.setenv("BITPLAN_CACHE", str(tiny_store.root))
    paths = []
    for bits in (4.5, 6):
        paths.append(tmp_path / f"plan-{bits}.json")
        save_plan(allocator.plan(tiny_profile, Budget(bits_per_weight=bits), verify=False), paths[-1])
    return paths


def test_reports_then_an_index_of_them(
    tiny_llama_dir: Path, plan_paths: list[Path], tmp_path: Path, capsys: Captured
) -> None:
    folders = [str(tmp_path / "reports" / path.stem) for path in plan_paths]
    for path, folder in zip(plan_paths, folders, strict=True):
        assert run(["report", str(tiny_llama_dir), "--plan", str(path), "--out", folder]) == 0
    assert run(["report", "--index", *folders, "--out", str(tmp_path / "overview")]) == 0
    page = tmp_path / "overview" / "index.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    text = page.read_text(encoding="utf-8")
    for path in plan_paths:
        assert f'href="../reports/{path.stem}/report.html"' in text
    summary = json.loads((Path(folders[0]) / "summary.json").read_text())
    assert summary["headline"]["budget_text"] == "bits per weight <= 4.5"


def test_two_plans_are_compared_without_their_model(plan_paths: list[Path], tmp_path: Path, capsys: Captured) -> None:
    assert run(["report", "--compare", *map(str, plan_paths), "--out", str(tmp_path / "both")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'both' / 'comparison.html'}\n"
    text = (tmp_path / "both" / "comparison.html").read_text(encoding="utf-8")
    assert "<h1>plan-4.5 beside plan-6</h1>" in text


def test_plans_of_one_file_name_are_called_by_their_paths(plan_paths: list[Path], tmp_path: Path) -> None:
    places = []
    for path, folder in zip(plan_paths, ("a", "b"), strict=True):
        (tmp_path / folder).mkdir()
        places.append(path.rename(tmp_path / folder / "plan.json"))
    assert run(["report", "--compare", *map(str, places), "--out", str(tmp_path / "both")]) == 0
    assert str(places[1]) in (tmp_path / "both" / "comparison.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL"], "one of --plan, --compare and --index must be given: got none"),
        (
            ["MODEL", "--plan", "a", "--index"],
            "one of --plan, --compare and --index must be given: got --plan, --index",
        ),
        (["--plan", "a"], "--plan must come with one MODEL: got 0 names"),
        (["x", "y", "--plan", "a"], "--plan must come with one MODEL: got 2 names"),
        (["x", "y", "--compare", "a", "b"], "--compare must come with one MODEL or none: got 2 names"),
        (["--index"], "--index must come with the directories of reports: got 0 names"),
        (["x", "--index", "--pdf"], "--parquet and --pdf belong to --plan: got one of them with --index"),
        (["--compare", "a", "b", "--parquet"], "--parquet and --pdf belong to --plan: got one of them with --compare"),
        (["--compare", "a", "b", "--text", "t"], "--text must come with MODEL, which is measured on it"),
    ],
)
def test_what_does_not_go_together_is_a_matter_of_usage(
    arguments: list[str], message: str, tmp_path: Path, capsys: Captured
) -> None:
    assert run(["report", *arguments, "--out", str(tmp_path / "out")]) == USAGE
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_a_pdf_without_a_browser_fails_before_anything_is_measured(
    tiny_llama_dir: Path, plan_paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["report", str(tiny_llama_dir), "--plan", str(plan_paths[0]), "--out", str(tmp_path / "out"), "--pdf"]
    assert run(command) == FAILURE
    assert "a PDF is printed by Chromium: got none of chromium" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parquet_beside_csv(tiny_llama_dir: Path, plan_paths: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    out = tmp_path / "out"
    assert run(["report", str(tiny_llama_dir), "--plan", str(plan_paths[0]), "--out", str(out), "--parquet"]) == 0
    assert {path.stem for path in out.glob("*.parquet")} == {path.stem for path in out.glob("*.csv")} >= {"plan"}
