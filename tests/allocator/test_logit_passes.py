"""A profile of few passes: asked for by an option, and good for plans, their verification and the report."""

import json
from pathlib import Path

import pytest

from allocator.cli import run
from allocator.store import Store
from sensitivity.measure_config import SINGLE_UNIT_KL
from tests.tiny_measurements import FLAGS


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "store"))
    return Store()


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert run([*arguments, "--json"]) == 0
    document: dict[str, object] = json.loads(capsys.readouterr().out)
    return document


def test_profile_of_few_passes_serves_every_verb(
    store: Store, tiny_llama_dir: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan = str(tiny_llama_dir), str(tmp_path / "plan.json")
    measured = ask(capsys, "measure", model, "--calibration", str(tiny_text), *FLAGS, "--logit-passes", "20")
    profile = store.find_profile(str(measured["profile"]))
    assert profile is not None and profile.logit_gram is None
    mask = profile.table(SINGLE_UNIT_KL).measured
    assert mask is not None and mask.sum() == 20
    document = ask(capsys, "plan", model, "--bits-per-weight", "4.5", "--out", plan)
    assert document["predicted_kl_with_interactions"] is None
    evaluations = document["evaluations"]
    assert isinstance(evaluations, list) and len(evaluations) > 2
    assert not any("interactions" in evaluation["name"] for evaluation in evaluations)
    assert run(["plan", model, "--max-kl", "0.5"]) == 0
    assert run(["report", model, "--plan", plan, "--out", str(tmp_path / "report")]) == 0
    assert "single_unit_kl" in (tmp_path / "report" / "sensitivities.csv").read_text()


def test_all_passes_keep_the_cross_terms(
    store: Store, tiny_llama_dir: Path, tiny_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("measure", str(tiny_llama_dir), "--calibration", str(tiny_text), *FLAGS)
    profile = store.find_profile(str(ask(capsys, *arguments, "--logit-passes", "all")["profile"]))
    assert profile is not None and profile.logit_gram is not None
    assert profile.table(SINGLE_UNIT_KL).measured is None


def test_without_fitted_plans_predictions_are_not_corrected(
    store: Store, tiny_llama_dir: Path, tiny_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_llama_dir)
    flags = (*FLAGS, "--metrics", "fisher", "--fit-plans", "none")
    profile = store.find_profile(str(ask(capsys, "measure", model, "--calibration", str(tiny_text), *flags)["profile"]))
    assert profile is not None and list(profile.losses) == ["fisher"] and profile.prediction_fits == {}
    document = ask(capsys, "plan", model, "--bits-per-weight", "4.5", "--no-verify")
    assert document["predicted_kl"] is not None
    assert document["corrected_kl"] is None and document["correction_error"] is None
