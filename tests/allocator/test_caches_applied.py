"""Caches of packed models: decoded as they were measured, generated from, and all the way through the command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import allocator
from allocator.artefacts import Model
from allocator.cli import run
from allocator.measuring import MeasureRequest
from allocator.plans import Plan
from allocator.store import Store
from runtime.apply import simulated_formats
from runtime.cached_attention import simulated_cache
from runtime.packed_model import load_packed, make_packed_cache, save_packed_
from sensitivity.profile import SensitivityProfile
from tests.tiny_measurements import BATCH, CONTEXT, FLAGS
from tests.tiny_models import build_tiny_llama, save_model


def test_a_packed_model_decodes_as_it_was_measured(
    cache_plan: Plan, tiny_llama_dir: Path, cache_profile: SensitivityProfile, cache_store: Store, tmp_path: Path
) -> None:
    applied = allocator.apply(str(tiny_llama_dir), cache_plan, tmp_path / "packed", store=cache_store)
    assert applied.file_bytes == applied.predicted_bytes == cache_plan.file_bytes
    packed, _, _ = load_packed(tmp_path / "packed")
    tokens = torch.from_numpy(cache_profile.evaluation_tokens[:2])
    cache = make_packed_cache(packed)
    assert cache is not None and cache_plan.cache is not None
    steps = [packed(t[:, None], past_key_values=cache, use_cache=True).logits for t in tokens.unbind(1)]
    model = Model(str(tiny_llama_dir)).reference.model
    with simulated_formats(model, cache_plan.weights), simulated_cache(model, cache_plan.cache.formats):
        simulated = model(tokens, use_cache=False).logits
    log_p, log_q = (torch.log_softmax(x.double(), dim=-1) for x in (simulated, torch.cat(steps, dim=1)))
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    # float32 sums in another order; a state beside the middle of two codes may even round to the other one.
    assert cache_plan.shipped is not None and abs(kl) < 0.01 * cache_plan.shipped.kl
    share = cache_plan.cache.memory_bytes / (CONTEXT * BATCH)
    assert cache.stored_bytes == share * tokens.numel()


def test_generation_uses_the_formats_of_the_packed_model(
    cache_plan: Plan, tiny_llama_dir: Path, cache_profile: SensitivityProfile, cache_store: Store, tmp_path: Path
) -> None:
    from allocator.generation import generate_text

    assert cache_plan.cache is not None
    narrow = replace(
        cache_plan, cache=replace(cache_plan.cache, formats=dict.fromkeys(cache_plan.cache.formats, "int2_channel"))
    )
    texts = []
    for name, made in (("plain", replace(cache_plan, cache=None)), ("narrow", narrow)):
        reference = Model(str(tiny_llama_dir)).load_again()
        formats = {} if made.cache is None else made.cache.formats
        save_packed_(reference, cache_plan.weights, tmp_path / name, metadata={}, formats_by_cache=formats)
        model, tokenizer = allocator.load(tmp_path / name)
        texts.append(generate_text(model, tokenizer, "The compiler reads", max_new_tokens=24))
        assert (make_packed_cache(model) is None) == (name == "plain")
    assert texts[0] != texts[1]


def test_caches_of_a_model_that_is_read_block_by_block_are_not_measured(
    tiny_llama_dir: Path, cache_request: MeasureRequest, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="read block by block cannot be measured: .* got int2_channel, int4_channel"):
        allocator.measure(Model(str(tiny_llama_dir), low_memory=True), request=cache_request, store=Store(tmp_path))


def test_caches_of_another_model_are_not_packed(tiny_llama_dir: Path, cache_plan: Plan, tmp_path: Path) -> None:
    reference = Model(str(tiny_llama_dir)).load_again()
    with pytest.raises(ValueError, match=r"for caches of the model: got 1 unknown names, first 'model.layers.9"):
        save_packed_(
            reference,
            cache_plan.weights,
            tmp_path / "packed",
            metadata={},
            formats_by_cache={"model.layers.9.self_attn.key_cache": "bf16"},
        )
    assert not (tmp_path / "packed").exists()


def test_the_command_measures_plans_and_reports(
    tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "store"))
    model = str(save_model(build_tiny_llama(head_dim=32), tmp_path / "model"))

    def ask(*arguments: str) -> Any:
        assert run([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    formats = ("--cache-formats", "int4_g32, int4_t32,bf16")
    assert ask("measure", model, "--calibration", str(tiny_text), *FLAGS, *formats)["cache_formats"] == [
        "int4_g32",
        "int4_t32",
        "bf16",
    ]
    points = ask("frontier", model, "--points", "4", "--context", "128", "--batch", "2")["points"]
    # 2 layers, keys and values, 2 heads of 32 numbers: 64 bytes a head at most, 19 at least, for 256 tokens.
    spread = points[-1]["memory_bytes"] - points[0]["memory_bytes"]
    assert spread > 256 * 2 * 2 * 2 * (64 - 19)
    path = str(tmp_path / "plan.json")
    asked = ("--memory", "200KiB", "--context", "128", "--batch", "2")
    made = ask("plan", model, *asked, "--no-verify", "--out", path)
    assert made["budget"] == "memory <= 0.20 MiB, context 128 tokens, batch 2"
    assert len(made["cache"]["formats"]) == 4
    assert run(["plan", model, *asked, "--no-verify"]) == 0
    printed = capsys.readouterr().out
    assert f"cache {made['cache']['memory_bytes'] / 2**20:.2f} MiB (128 tokens, batch 2): " in printed
    applied = ask("apply", model, "--plan", path, "--out", str(tmp_path / "packed"))
    assert applied["difference_bytes"] == 0
    assert run(["generate", str(tmp_path / "packed"), "--prompt", "The cache", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("The cache")
    assert run(["report", model, "--plan", path, "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "MiB of cache at 128 tokens and batch 2" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cache-formats", "int9_g3"), "a cache format must be a known name: got 'int9_g3'"),
        (("--cache-formats", "int4_g32"), "every cache must have an allowed format"),
        (("--cache-formats", "bf16", "--metrics", "weight_error"), "need a metric of weights that is too"),
    ],
)
def test_the_command_refuses_caches_that_cannot_be(
    arguments: tuple[str, ...],
    message: str,
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "store"))
    assert run(["measure", str(tiny_llama_dir), *arguments]) in (1, 2)
    assert message in capsys.readouterr().err.replace("\n", " ")
