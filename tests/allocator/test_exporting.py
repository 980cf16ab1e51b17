"""The verb export: legal plans become files with a command, illegal ones are refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
from transformers import AutoModelForCausalLM

import allocator
from allocator.budget import Budget
from allocator.cli import measure, run
from allocator.cli_options import make_request
from allocator.store import Store
from runtime.engines import ENGINES
from runtime.formats import DEFAULT_FORMATS
from sensitivity.profile import SensitivityProfile
from tests.tiny_measurements import make_request as make_tiny_request
from tests.tiny_models import build_tiny_llama, save_model


@pytest.fixture(scope="module")
def plan(tiny_profile: SensitivityProfile) -> allocator.Plan:
    return allocator.plan(tiny_profile, Budget(bits_per_weight=10.0), verify=False, engine="vllm")


def test_an_export_has_files_and_a_command(
    plan: allocator.Plan, tiny_llama_dir: Path, tiny_store: Store, tmp_path: Path
) -> None:
    exported = allocator.export(str(tiny_llama_dir), plan, "vllm", tmp_path / "out", store=tiny_store)
    assert exported.command == f"vllm serve {tmp_path / 'out'} --dtype float16"
    assert exported.files == {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()}
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    quantized = {name.removesuffix(".weight") for name, f in plan.weights.items() if f != "bf16"}
    assert {target for group in groups.values() for target in group["targets"]} == quantized


# transformers runs none of the asymmetric formats that were measured: 16 bits are left to it.
@pytest.mark.parametrize(("engine", "bits"), [("transformers", 16.0), ("vllm", 9.0), ("mlx-lm", 6.0)])
def test_a_budget_is_one_of_the_engines_file(
    engine: str, bits: float, tiny_profile: SensitivityProfile, tiny_llama_dir: Path, tiny_store: Store, tmp_path: Path
) -> None:
    model = str(tiny_llama_dir)
    given = {"profile": tiny_profile, "store": tiny_store, "verify": False}
    plan = allocator.plan(model, Budget(bits_per_weight=bits), engine=engine, **given)
    exported = allocator.export(model, plan, engine, tmp_path / "out", store=tiny_store)
    assert exported.files["model.safetensors"] == exported.predicted_bytes == plan.memory_bytes
    # The packed file has another length, and that one is predicted too.
    applied = allocator.apply(model, plan, tmp_path / "packed", store=tiny_store)
    assert applied.file_bytes == applied.predicted_bytes != plan.memory_bytes
    evaluations = allocator.evaluate(model, plan, store=tiny_store)
    assert all(e.memory_bytes <= plan.memory_bytes for e in evaluations if e.kind == "uniform")
    assert next(e for e in evaluations if e.kind == "plan").memory_bytes == plan.memory_bytes


def test_a_plan_of_a_profile_alone_predicts_no_file(
    plan: allocator.Plan, tiny_llama_dir: Path, tiny_store: Store, tmp_path: Path
) -> None:
    # Nothing was known of the file's other bytes when it was made.
    exported = allocator.export(str(tiny_llama_dir), plan, "vllm", tmp_path / "out", store=tiny_store)
    assert exported.predicted_bytes is None


def test_the_command_line_exports(
    tiny_profile: SensitivityProfile, tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = allocator.plan(tiny_profile, Budget(bits_per_weight=16.0), verify=False, engine="transformers")
    allocator.save_plan(plan, tmp_path / "plan.json")
    options = ["--plan", str(tmp_path / "plan.json"), "--engine", "transformers", "--out", str(tmp_path / "out")]
    assert run(["export", str(tiny_llama_dir), *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["files"]["model.safetensors"] > 0
    loaded = AutoModelForCausalLM.from_pretrained(document["directory"], dtype=torch.float32)
    assert not loaded.training
    assert run(["export", str(tiny_llama_dir), *options]) == 0
    assert document["command"] in capsys.readouterr().out


def test_what_an_engine_cannot_load_is_refused(
    plan: allocator.Plan, tiny_llama_dir: Path, tiny_store: Store, tmp_path: Path
) -> None:
    weights = dict(plan.weights)
    weights["model.layers.0.self_attn.k_proj.weight"] = "int8_g64"
    with pytest.raises(ValueError, match=r"1 units that vllm cannot load, first '.*q_proj.*one format, got .*int8_g64"):
        allocator.export(str(tiny_llama_dir), replace(plan, weights=weights), "vllm", tmp_path, store=tiny_store)
    with pytest.raises(ValueError, match="engine must be a known name: got 'onnx'"):
        allocator.export(str(tiny_llama_dir), plan, "onnx", tmp_path, store=tiny_store)
    assert list(tmp_path.iterdir()) == []


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["engines"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("llama.cpp\n  reads: GGUF")
    assert run(["engines", "--json"]) == 0
    assert {engine["name"] for engine in json.loads(capsys.readouterr().out)["engines"]} >= {"transformers", "vllm"}


def test_measuring_for_an_engine_takes_its_formats() -> None:
    names = [option.name for option in measure.params if isinstance(option, click.Option)]
    unset = {**dict.fromkeys(map(str, names)), "fuse": (), "pins": (), "routers": False}
    assert make_request({**unset, "engine": "llama.cpp"}).formats == ENGINES["llama.cpp"].menu
    assert make_request({**unset, "engine": "llama.cpp", "formats": "q4_0,bf16"}).formats == ("q4_0", "bf16")
    assert make_request(unset).formats == DEFAULT_FORMATS
    with pytest.raises(ValueError, match="engine must be a known name: got 'onnx'"):
        make_request({**unset, "engine": "onnx"})


def test_a_plan_with_a_matrix_before_the_tied_head_is_refused(tiny_text: Path, tmp_path: Path) -> None:
    directory, store = save_model(build_tiny_llama(tied=True), tmp_path / "model"), Store(tmp_path / "store")
    request = make_tiny_request(tiny_text, transforms=("hadamard",))
    profile = allocator.measure(str(directory), request=request, store=store)
    plan = allocator.plan(profile, Budget(bits_per_weight=16.0), verify=False, store=store)
    with pytest.raises(ValueError, match="an engine computes what the architecture says: got a plan under 'hadamard"):
        allocator.export(str(directory), plan, "transformers", tmp_path / "out", store=store)
