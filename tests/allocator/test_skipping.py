"""Skipped experts of a planned mixture: found on calibration text, measured as they are used, used by the commands."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import allocator
from allocator import Budget, Plan, SensitivityProfile, Store
from allocator.artefacts import Model
from allocator.cli import run
from allocator.generation import generate_text
from allocator.plan_files import save_plan
from allocator.skipping import SkippingFound, find_skipping
from runtime.apply import simulated_formats
from runtime.expert_skipping import load_skipping, save_skipping, skipped_experts
from sensitivity.experts.skip_calibration import calibrate_skipping
from tests.tiny_measurements import SMALL_MOE, make_moe_request


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def profile(store: Store) -> SensitivityProfile:
    return allocator.measure(
        str(SMALL_MOE), request=make_moe_request(("int4_channel", "int8_channel", "bf16")), store=store
    )


@pytest.fixture(scope="module")
def plan(profile: SensitivityProfile) -> Plan:
    return allocator.plan(profile, Budget(bits_per_weight=6.0), verify=False)


@pytest.fixture(scope="module")
def found(plan: Plan, store: Store) -> SkippingFound:
    return find_skipping(str(SMALL_MOE), plan, store=store)


def test_scores_are_those_of_the_model_as_it_runs(
    found: SkippingFound, plan: Plan, profile: SensitivityProfile
) -> None:
    reference = Model(str(SMALL_MOE)).reference
    model, tokens = reference.model, torch.from_numpy(profile.evaluation_tokens)
    assert found.skipping == calibrate_skipping(
        model, torch.from_numpy(profile.calibration_tokens), weights_fingerprint=reference.weights_fingerprint
    )

    def log_probabilities() -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(model(tokens, use_cache=False).logits.double(), dim=-1)

    full = log_probabilities()
    with simulated_formats(model, plan.weights):
        planned = log_probabilities()
        with skipped_experts(model, found.skipping) as count:
            both = log_probabilities()
    scores = {score.name: score for score in found.scores}
    for name, after in (("plan", planned), ("plan, experts skipped", both)):
        expected = (full.exp() * (full - after)).sum(-1).mean().item()
        assert scores[name].kl == pytest.approx(expected, rel=1e-3)
        assert scores[name].kl_low <= scores[name].kl <= scores[name].kl_high
    assert scores["plan"].skipped_share == 0.0
    assert scores["plan, experts skipped"].skipped_share == pytest.approx(count.skipped_share, abs=1e-3)
    # The median, less the protected tokens; text differs, and the later layers see what the earlier skipped.
    assert 0.2 < scores["reference, experts skipped"].skipped_share < 0.3
    assert scores["reference, experts skipped"].kl > 0
    assert len(found.skipping.ratio) == 4 and np.isfinite(found.skipping.ratio).all()


def test_commands_find_and_use_it(
    found: SkippingFound,
    plan: Plan,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BITPLAN_CACHE", str(store.root))
    model, plan_path, packed = str(SMALL_MOE), tmp_path / "plan.json", tmp_path / "packed"
    file = tmp_path / "skipping.json"
    save_plan(plan, plan_path)
    asked = ["skip-experts", model, "--plan", str(plan_path), "--out", str(file)]
    assert run([*asked, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert load_skipping(file) == found.skipping
    assert document["scores"][1]["kl"] == pytest.approx(found.scores[1].kl, rel=1e-6)
    assert run([*asked, "--quantile", "0.25"]) == 0
    assert "plan, experts skipped" in capsys.readouterr().out
    assert all(np.less(load_skipping(file).ratio, found.skipping.ratio))
    assert run(["apply", model, "--plan", str(plan_path), "--out", str(packed)]) == 0
    shown = {}
    capsys.readouterr()
    for value in (str(file), "0.9", "1"):
        generate = ["generate", str(packed), "--prompt", "The compiler", "--max-new-tokens", "24"]
        assert run([*generate, "--skip-experts", value]) == 0
        shown[value] = capsys.readouterr().out.strip()
        loaded, tokenizer = allocator.load(packed, skip_experts=value)
        assert shown[value] == generate_text(loaded, tokenizer, "The compiler", max_new_tokens=24).strip()
    assert shown["1"] != shown[str(file)]
    other = tmp_path / "other.json"
    save_skipping(replace(found.skipping, weights_fingerprint="of another model"), other)
    assert run([*generate, "--skip-experts", str(other)]) == 1
    assert "of the model and the transforms that were packed: got" in capsys.readouterr().err
    assert run([*generate, "--skip-experts", "2"]) == 1
    assert "a ratio of expert weights must be from 0 to 1: got ratio=2.0" in capsys.readouterr().err
    assert run([*generate, "--skip-experts", str(tmp_path / "no.json")]) == 1
    assert "that 'bitplan skip-experts' wrote" in capsys.readouterr().err


def test_models_without_experts_are_refused(
    tiny_llama_dir: Path, tiny_profile: SensitivityProfile, tiny_store: Store
) -> None:
    plan = allocator.plan(tiny_profile, Budget(bits_per_weight=6.0), verify=False)
    with pytest.raises(ValueError, match="a model must be a mixture of experts"):
        find_skipping(str(tiny_llama_dir), plan, store=tiny_store)
