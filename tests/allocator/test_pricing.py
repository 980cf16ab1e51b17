"""Recipes beside the optimum of their bytes: never better than it, recomputed by hand, and a plan like any other."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import allocator
from allocator.cli import run
from allocator.engine_rules import restrict_profile
from allocator.store import Store
from runtime.engines import ENGINES
from runtime.formats import find_format
from sensitivity.profile import SensitivityProfile

NAMES = [f"model.layers.{i}.{p}_proj" for i in (0, 1) for p in ("self_attn.q", "self_attn.k", "self_attn.v")]


def write_recipe(path: Path, bits: dict[str, int]) -> Path:
    groups = {
        f"group_{b}": {
            "targets": [name for name, width in bits.items() if width == b],
            "weights": {"num_bits": b, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64},
        }
        for b in sorted(set(bits.values()))
    }
    path.write_text(json.dumps({"config_groups": groups}))
    return path


def test_a_recipe_is_priced(
    tiny_profile: SensitivityProfile, tiny_llama_dir: Path, tiny_store: Store, tmp_path: Path
) -> None:
    bits = dict(zip(NAMES, (2, 3, 4, 8, 2, 3), strict=True))
    recipe = write_recipe(tmp_path / "recipe.json", bits)
    priced = allocator.price(str(tiny_llama_dir), recipe, metric="fisher", profile=tiny_profile, store=tiny_store)
    table, candidates = tiny_profile.table("fisher"), tiny_profile.candidates
    names = {f"{name}.weight": f"int{b}_g64" for name, b in bits.items()}
    choice = [candidates.format_index(names.get(unit.weights[0].name, "bf16")) for unit in candidates.units]
    expected = table.loss[np.arange(len(choice)), choice].sum()
    assert priced.recipe.predicted_kl == pytest.approx(expected, rel=1e-12)
    assert priced.best.predicted_kl <= expected
    assert priced.best.memory_bytes <= priced.recipe.memory_bytes
    assert priced.recipe.relative_gap == pytest.approx((expected - priced.best.lower_bound) / expected)
    # transformers runs none of these formats, and without them takes more bytes.
    assert priced.best_legal is None
    assert "best for transformers: none" in priced.describe()


def test_a_recipe_that_is_legal_has_a_best_legal_plan(
    tiny_profile: SensitivityProfile, tiny_llama_dir: Path, tiny_store: Store, tmp_path: Path
) -> None:
    config = {"quant_method": "gptq", "bits": 3, "group_size": 64, "sym": False, "dynamic": {}}
    (tmp_path / "quantize_config.json").write_text(json.dumps(config))
    priced = allocator.price(
        str(tiny_llama_dir), tmp_path / "quantize_config.json", metric="fisher", profile=tiny_profile, store=tiny_store
    )
    assert priced.best_legal is not None
    assert priced.best.predicted_kl <= priced.best_legal.predicted_kl <= priced.recipe.predicted_kl
    assert priced.kind == "gptqmodel"


def test_types_that_are_stored_alike_are_alike(
    tiny_profile: SensitivityProfile, tiny_llama_dir: Path, tiny_store: Store, tmp_path: Path
) -> None:
    # BF16 is measured as bf16; F16 is another type and was not measured.
    (tmp_path / "types.txt").write_text("weight=bf16")
    priced = allocator.price(str(tiny_llama_dir), tmp_path / "types.txt", profile=tiny_profile, store=tiny_store)
    assert set(priced.recipe.weights.values()) == {"bf16"}
    formats = tuple(find_format("int4_g32_sym") if f.name == "int4_g64" else f for f in tiny_profile.candidates.formats)
    named = replace(tiny_profile, candidates=replace(tiny_profile.candidates, formats=formats))
    (tmp_path / "types.txt").write_text("weight=q4_0")
    priced = allocator.price(str(tiny_llama_dir), tmp_path / "types.txt", profile=named, store=tiny_store)
    assert set(priced.recipe.weights.values()) == {"int4_g32_sym"}
    with pytest.raises(ValueError, match="got 'fp16' for 'model.embed_tokens'"):
        (tmp_path / "types.txt").write_text("weight=f16")
        allocator.price(str(tiny_llama_dir), tmp_path / "types.txt", profile=named, store=tiny_store)


def test_the_command_writes_a_plan_that_can_be_evaluated(
    tiny_profile: SensitivityProfile,
    tiny_llama_dir: Path,
    tiny_store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BITPLAN_CACHE", str(tiny_store.root))
    recipe = write_recipe(tmp_path / "recipe.json", dict.fromkeys(NAMES, 4))
    options = ["--recipe", str(recipe), "--out", str(tmp_path / "plan.json")]
    assert run(["price", str(tiny_llama_dir), *options]) == 0
    assert "times what the best plan of its bytes loses" in capsys.readouterr().out
    assert run(["price", str(tiny_llama_dir), *options, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    plan = allocator.load_plan(tmp_path / "plan.json")
    assert document["recipe"]["predicted_kl"] == plan.predicted_kl
    evaluations = allocator.evaluate(str(tiny_llama_dir), plan, store=tiny_store)
    assert [e.kind for e in evaluations][:2] == ["reference", "plan"]


def test_what_was_not_measured_is_refused(
    tiny_profile: SensitivityProfile, tiny_llama_dir: Path, tiny_store: Store, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.json", {NAMES[0]: 5})
    with pytest.raises(
        ValueError, match=r"got 'int5_g64' for '.*q_proj' \(not measured\)\. Measure with --formats bf16,int5"
    ):
        allocator.price(str(tiny_llama_dir), recipe, profile=tiny_profile, store=tiny_store)
    recipe = write_recipe(tmp_path / "recipe.json", {NAMES[0]: 4})
    fused = restrict_profile(tiny_profile, ENGINES["vllm"])
    with pytest.raises(ValueError, match="one format: got bf16, int4_g64 for .*q_proj.*finer units"):
        allocator.price(str(tiny_llama_dir), recipe, profile=fused, store=tiny_store)
