"""A menu of every family, the whole way: measured, planned, applied and generated from, by the commands."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import allocator
from allocator import Model, Store
from allocator.cli import run
from allocator.renderings import rendering_of_plan
from runtime.apply import simulated_formats
from runtime.formats import FORMATS
from runtime.kernels.dispatch import kernel_path
from tests.tiny_measurements import FLAGS

# Of each family that fits a row of 64; the formats of blocks of 256 fit no layer of the tiny models.
MENU = (
    *("int1_g32", "int2_g16_sym_pow2", "int4_g64", "int7_channel_sym"),
    *("mxfp4", "mxfp6_e2m3", "mxint8", "nvfp4", "nvint4", "fp3_g32", "fp6_e3m2_g64", "fp8_e4m3_channel"),
    *("ternary_channel", "intfp4_g32", "bcq3_channel", "nested8_channel", "nested4_8_g32", "bitstack2_r4"),
    *("int1_top20int4_channel", "int4_top12int8_channel", "int2_mix25int4_g32_outliers"),
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q6_k", "bf16"),
)


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", ["3", "6.5"])
def test_mixed_families(
    quantizer: str,
    bits: str,
    tiny_llama_dir: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "store"))
    model, plan_path, packed = str(tiny_llama_dir), tmp_path / "plan.json", tmp_path / "packed"
    few = ("--formats", ",".join(MENU), "--metrics", "fisher", "--fit-plans", "none", "--quantizer", quantizer)
    assert run(["measure", model, "--calibration", str(tiny_text), *FLAGS, *few]) == 0, capsys.readouterr().err
    assert run(["plan", model, "--bits-per-weight", bits, "--no-verify", "--out", str(plan_path)]) == 0
    capsys.readouterr()
    assert run(["apply", model, "--plan", str(plan_path), "--out", str(packed), "--json"]) == 0
    applied = json.loads(capsys.readouterr().out)
    plan = allocator.load_plan(plan_path)
    assert len({FORMATS[name].kind for name in plan.weights.values()}) >= 3
    assert applied["file_bytes"] == applied["predicted_bytes"] == (packed / "model.safetensors").stat().st_size
    assert_same_logits(model, plan, packed)
    assert_stored_types(packed, plan.weights)
    assert run(["generate", str(packed), "--prompt", "The compiler reads", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()
    assert run(["report", model, "--plan", str(plan_path), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in set(plan.weights.values()))


def assert_same_logits(model: str, plan: allocator.Plan, packed: Path) -> None:
    """Checks the reloaded model against the one that is simulated with the plan's renderings, bit for bit."""
    reference = Model(model).reference.model
    reloaded, tokenizer = allocator.load(packed)
    tokens = tokenizer("The compiler reads a source file and writes", return_tensors="pt").input_ids
    with torch.no_grad(), kernel_path("reference"):
        with simulated_formats(reference, plan.weights, quantizer=rendering_of_plan(plan, reference, Store())):
            expected = reference(tokens, use_cache=False).logits
        assert torch.equal(reloaded(tokens, use_cache=False).logits, expected)


def assert_stored_types(packed: Path, formats: Mapping[str, str]) -> None:
    """Checks that the file holds the tensors of every weight's format, by names and types."""
    with safe_open(packed / "model.safetensors", framework="pt") as file:
        stored = {name: str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118
    for weight, format_name in formats.items():
        format_ = FORMATS[format_name]
        expected = {f"{weight}.{t.name}": f"torch.{t.dtype}" for t in format_.stored_tensors((1, 64))}
        assert {name: dtype for name, dtype in stored.items() if name.startswith(f"{weight}.")} == expected
