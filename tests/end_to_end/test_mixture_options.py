"""The command's options for mixtures of experts: granularity, routers, batch and self-balanced calibration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from allocator.artefacts import Model
from allocator.cli import run
from allocator.pipeline import load
from allocator.plan_files import load_plan
from runtime.apply import simulated_formats
from runtime.kernels.dispatch import kernel_path
from sensitivity.profile_files import load_profile
from tests.tiny_measurements import FLAGS

TOKENS = torch.randint(0, 320, (2, 11), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def ask(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code = run([*map(str, arguments), "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    document: dict[str, Any] = json.loads(printed.out)
    return document


@pytest.mark.parametrize("family", ["tiny_mixtral_dir", "tiny_qwen_moe_dir"])
def test_routers_that_take_formats_are_packed_as_priced(
    family: str, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    model_dir: Path = request.getfixturevalue(family)
    measured, plan_path, out = tmp_path / "profile", tmp_path / "plan.json", tmp_path / "packed"
    flags = (*FLAGS, "--metrics", "fisher", "--fit-plans", "none")
    ask(capsys, "measure", model_dir, "--calibration", tiny_text, *flags, "--quantize-routers", "--out", measured)
    routers = [unit for unit in load_profile(measured).candidates.units if unit.kind == "router"]
    assert len(routers) >= 2
    ask(capsys, "plan", model_dir, "--bits-per-weight", "5", "--no-verify", "--out", plan_path)
    plan = load_plan(plan_path)
    assert all(weight.name in plan.weights for unit in routers for weight in unit.weights)
    applied = ask(capsys, "apply", model_dir, "--plan", plan_path, "--out", out)
    assert applied["difference_bytes"] == 0
    reference = Model(str(model_dir)).reference.model
    packed, _ = load(out)
    with torch.no_grad(), simulated_formats(reference, plan.weights):
        expected = reference(TOKENS, use_cache=False).logits
    with torch.no_grad(), kernel_path("reference"):
        assert torch.equal(packed(TOKENS, use_cache=False).logits, expected)


def test_a_stack_gets_one_format_and_a_batch_reads_more(
    tiny_mixtral_dir: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*FLAGS, "--metrics", "fisher", "--fit-plans", "none", "--experts", "stack")
    ask(capsys, "measure", tiny_mixtral_dir, "--calibration", tiny_text, *flags)
    limit = ("--limit", "read_bytes=1GiB")
    one = ask(capsys, "plan", tiny_mixtral_dir, "--bits-per-weight", "5", "--no-verify", *limit)
    many = ask(capsys, "plan", tiny_mixtral_dir, "--bits-per-weight", "5", "--no-verify", *limit, "--batch", "64")
    assert one["weights"] == many["weights"]
    assert one["use"]["read_bytes"] < many["use"]["read_bytes"]
    assert many["budget"].endswith("batch 64")
    for layer in (0, 1):
        formats = {f for name, f in one["weights"].items() if f"layers.{layer}." in name and "experts" in name}
        assert len(formats) == 1


def test_self_balanced_text_is_sampled_once(
    tiny_mixtral_dir: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (*FLAGS, "--metrics", "fisher", "--fit-plans", "none")
    first = ask(capsys, "measure", tiny_mixtral_dir, "--calibration", "self-balanced", *flags)
    kept = {path: path.stat().st_mtime_ns for path in (cache / "texts").glob("sampled-*.safetensors")}
    assert len(kept) == 4
    again = ask(capsys, "measure", tiny_mixtral_dir, "--calibration", "self-balanced", *flags)
    assert again["profile"] == first["profile"]
    assert {path: path.stat().st_mtime_ns for path in (cache / "texts").glob("sampled-*.safetensors")} == kept
    plain = ask(capsys, "measure", tiny_mixtral_dir, *flags)
    assert plain["profile"] != first["profile"]


def test_a_dense_model_has_no_experts_to_balance(tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["measure", str(tiny_llama_dir), "--calibration", "self-balanced", *FLAGS]) == 1
    assert "a model must be a mixture of experts" in capsys.readouterr().err
