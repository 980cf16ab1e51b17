"""A model that is read block by block: the numbers and the files of the model in memory, to the bit, in less memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import allocator
from allocator import Budget, Store
from allocator.artefacts import Model
from allocator.cli import run
from sensitivity.measure_config import BLOCKWISE_METRICS, MeasureConfig
from sensitivity.profile import SensitivityProfile
from sensitivity.profile_files import save_profile
from tests.end_to_end.test_models import MODELS
from tests.tiny_measurements import CONFIG, FLAGS, make_request
from tests.tiny_models import build_tokenizer

BUDGET = Budget(bits_per_weight=4.6)
BLOCKWISE = MeasureConfig(**{**vars(CONFIG), "metrics": BLOCKWISE_METRICS})


def read_profile(profile: SensitivityProfile, directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the arrays of a profile and the rest of it, without the time it took."""
    save_profile(profile, directory)
    rest = json.loads((directory / "profile.json").read_text())
    del rest["provenance"]["measured_in_s"]
    return load_file(directory / "arrays.safetensors"), rest


@pytest.mark.parametrize("fixture", MODELS)
def test_every_verb_gives_what_it_gives_in_memory(
    fixture: str, request: pytest.FixtureRequest, tiny_text: Path, tmp_path: Path
) -> None:
    directory = str(request.getfixturevalue(fixture))
    whole, stored = Model(directory), Model(directory, low_memory=True)
    stores = Store(tmp_path / "whole_store"), Store(tmp_path / "stored_store")
    profiles = [
        allocator.measure(model, request=make_request(tiny_text, config=config), store=store)
        for model, config, store in zip((whole, stored), (BLOCKWISE, CONFIG), stores, strict=True)
    ]
    arrays, rest = read_profile(profiles[0], tmp_path / "whole")
    stored_arrays, stored_rest = read_profile(profiles[1], tmp_path / "stored")
    assert stored_rest == rest and stored_arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(stored_arrays[name], array, err_msg=name)
    assert profiles[1].prediction_fits and profiles[1].fisher_sketch is not None

    plans = [
        allocator.plan(model, BUDGET, evolve=60, profile=profile, store=store)
        for model, profile, store in zip((whole, stored), profiles, stores, strict=True)
    ]
    assert plans[0].evaluations == plans[1].evaluations and plans[0].weights == plans[1].weights
    evaluations = [allocator.evaluate(m, plans[0], store=s) for m, s in zip((whole, stored), stores, strict=True)]
    assert evaluations[0] == evaluations[1]
    assert {p.device.type for p in stored.reference.model.parameters()} == {"meta"}

    for name, model in (("whole", whole), ("stored", stored)):
        applied = allocator.apply(model, plans[0], tmp_path / name / "packed")
        assert applied.file_bytes == plans[0].memory_bytes
    files = [sorted((tmp_path / name / "packed").iterdir()) for name in ("whole", "stored")]
    assert [p.name for p in files[0]] == [p.name for p in files[1]]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_the_commands(
    tiny_llama_dir: Path,
    tiny_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "cache"))
    model, plan, packed = str(tiny_llama_dir), str(tmp_path / "plan.json"), str(tmp_path / "packed")
    assert run(["measure", model, "--low-memory", "--calibration", str(tiny_text), *FLAGS, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["metrics"] == ["weight_error", "fisher"]
    assert "output_error and single_unit_kl need it in memory and are left out" in err
    assert run(["plan", model, "--bits-per-weight", "4.6", "--no-verify", "--out", plan]) == 0
    assert run(["apply", model, "--plan", plan, "--out", packed, "--low-memory"]) == 0
    assert run(["evaluate", model, "--plan", plan, "--low-memory"]) == 0
    assert run(["report", model, "--plan", plan, "--out", str(tmp_path / "report"), "--low-memory"]) == 0
    assert run(["generate", packed, "--prompt", "The compiler", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert run(["plan", model, "--bits-per-weight", "4.6", "--refine", "1", "--low-memory"]) == 1
    assert "refinement needs the whole model in memory: got refine=1 with low_memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "fisher,output_error"], r"must be among weight_error, fisher: got ['output_error']"),
        (["--quantizer", "gptq"], "must need no input statistics: got 'gptq'. Use rtn, clipping, hqq."),
        (["--calibration", "self-balanced"], "calibration text of a model that is read block by block must be named"),
    ],
    ids=["metric", "quantizer", "text"],
)
def test_what_needs_the_whole_model_is_refused(
    arguments: list[str],
    message: str,
    tiny_llama_dir: Path,
    tiny_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path))
    given = ["measure", str(tiny_llama_dir), "--low-memory", "--calibration", str(tiny_text), *FLAGS]
    assert run([*given, *arguments]) == 1
    assert message in capsys.readouterr().err


LAYERS, HIDDEN, FEED_FORWARD = 24, 512, 2048


def write_large_model(directory: Path) -> int:
    """Writes a model of 24 layers in bfloat16 and returns its bytes in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320,
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="100MB")
    build_tokenizer().save_pretrained(directory)
    return 4 * sum(p.numel() for p in model.parameters())


def peak_of(verb: str, model: str, text: str, out: str) -> int:
    """Returns by how many bytes a verb raises the resident memory of this process above what imports take."""
    stored, store = Model(model, low_memory=True), Store(Path(out) / "store")
    assert stored.reference.tokenizer is not None
    before = peak_memory_bytes()
    if verb == "measure":
        config = MeasureConfig(
            fisher_sequences=4,
            sequence_tokens=16,
            fit_plans=4,
            fit_sequences=2,
            selection_sequences=2,
            evaluation_sequences=2,
            evaluation_sequence_tokens=16,
        )
        request = make_request(Path(text), formats=("int2_g64", "int4_g64"), config=config)
        allocator.measure(stored, request=request, store=store)
    else:
        made = allocator.plan(stored, Budget(bits_per_weight=4.0), store=store)
        allocator.apply(stored, made, Path(out) / "packed", store=store)
    return peak_memory_bytes() - before


def peak_memory_bytes() -> int:
    """Returns the most bytes that this process has had in memory; what ``getrusage`` says counts its parent's too."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


@pytest.mark.slow
def test_memory_stays_below_that_of_the_model(tiny_text: Path, tmp_path: Path) -> None:
    model_bytes = write_large_model(tmp_path / "model")
    assert model_bytes > 380 << 20
    # In layers of float32. Measuring: weights, the file they are read from, errors of two formats, gradients of four
    # sequences, one more while it is differentiated, hidden states: 10. Applying: weights, as read, file, a candidate,
    # and the packed model, 4 of 32 bits of all layers: 7. Two fifths more for libraries that load on first use.
    for verb, layers in (("measure", 14), ("apply", 10)):
        arguments = [verb, str(tmp_path / "model"), str(tiny_text), str(tmp_path)]
        done = subprocess.run(
            [sys.executable, "-m", "tests.end_to_end.test_low_memory", *arguments],
            cwd=Path(__file__).parents[2],
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        )
        peak = int(done.stdout)
        assert 0 < peak < layers * model_bytes / LAYERS, (verb, peak, model_bytes)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(peak_of(*sys.argv[1:]))
