"""Prefixes of a plan: searched, measured as they are used, shipped and used; never with another model's weights."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import allocator
from allocator import Budget, Plan, SensitivityProfile, Store
from allocator.artefact_match import ArtefactMismatch
from allocator.artefacts import Model
from allocator.cli import run
from allocator.generation import generate_text
from allocator.plan_files import save_plan
from allocator.plans import CachePlan
from allocator.prefixes import PrefixFound, check_prefix
from runtime.apply import simulated_formats
from runtime.transforms.prefix_tokens import PREFIX_FILE, load_prefix, save_prefix
from tests.tiny_measurements import SMALL_MOE, make_moe_request

# Where a plan loses much, a prefix can win some of it back on the text that it was searched on.
BUDGET = Budget(bits_per_weight=2.6)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def profile(store: Store) -> SensitivityProfile:
    return allocator.measure(
        str(SMALL_MOE), request=make_moe_request(("int2_channel", "int4_channel", "bf16")), store=store
    )


@pytest.fixture(scope="module")
def plan(profile: SensitivityProfile) -> Plan:
    return allocator.plan(profile, BUDGET, verify=False)


@pytest.fixture(scope="module")
def found(plan: Plan, store: Store) -> PrefixFound:
    made = allocator.find_prefix(str(SMALL_MOE), plan, length=2, candidates=24, store=store)
    assert made.prefix is not None, "another budget must be tried for these tests"
    return made


def test_search_goes_down(found: PrefixFound) -> None:
    assert found.prefix is not None
    assert len(found.search_kl) == 1 + len(found.prefix.tokens)
    assert (np.diff(found.search_kl) < 0).all()
    assert found.prefix_bytes == found.prefix.stored_bytes


def test_scores_are_those_of_the_tokens_themselves(found: PrefixFound, plan: Plan, profile: SensitivityProfile) -> None:
    """Recomputed without a cache: the unquantized model behind the tokens, and the plan without them."""
    assert found.prefix is not None
    model = Model(str(SMALL_MOE)).reference.model
    tokens = torch.from_numpy(profile.evaluation_tokens)
    count = len(found.prefix.tokens)
    whole = torch.cat([found.prefix.tokens.expand(len(tokens), -1), tokens], dim=1)
    with torch.no_grad():
        before = torch.log_softmax(model(tokens).logits.double(), -1)
        behind = torch.log_softmax(model(whole).logits[:, count:].double(), -1)
        with simulated_formats(model, plan.weights):
            quantized = torch.log_softmax(model(tokens).logits.double(), -1)
    scores = {score.name: score for score in found.scores}
    for name, after in (("plan", quantized), ("reference behind the prefix", behind)):
        kl = (before.exp() * (before - after)).sum(-1).mean()
        nll = -after[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
        assert scores[name].kl == pytest.approx(float(kl), rel=1e-4)
        assert scores[name].perplexity == pytest.approx(float(nll.exp()), rel=1e-5)
    gain = scores["plan"].kl - scores["plan behind the prefix"].kl
    assert f"lowers KL by {gain:.4g} nats per token" in found.verdict


def test_no_prefix_is_an_answer(profile: SensitivityProfile, store: Store) -> None:
    """Of a plan that loses next to nothing every prefix takes more than it gives."""
    lossless = allocator.plan(profile, Budget(bits_per_weight=16.5), verify=False)
    made = allocator.find_prefix(str(SMALL_MOE), lossless, length=1, candidates=4, store=store)
    assert made.prefix is None and made.scores == () and made.prefix_bytes == 0
    assert made.verdict.endswith("no prefix.")


def test_other_weights_are_refused(
    found: PrefixFound, plan: Plan, tiny_llama_dir: Path, tmp_path: Path, store: Store
) -> None:
    assert found.prefix is not None
    save_prefix(found.prefix, tmp_path / "prefix")
    with pytest.raises(ArtefactMismatch, match="a prefix must be used with the model and the transforms"):
        check_prefix(tmp_path / "prefix", Model(str(tiny_llama_dir)).reference, plan)
    with pytest.raises(ValueError, match="a prefix must be a file"):
        allocator.apply(str(SMALL_MOE), plan, tmp_path / "packed", prefix=tmp_path / "no", store=store)
    assert not (tmp_path / "packed").exists()


def test_a_prefix_and_a_quantized_cache_do_not_go_together(plan: Plan, tmp_path: Path) -> None:
    cached = replace(plan, cache=CachePlan(context=64, batch=1, memory_bytes=10, formats={}))
    with pytest.raises(ValueError, match=r"prefix tokens ship with keys and values as they are: got '.*prefix'"):
        check_prefix(tmp_path / "prefix", Model(str(SMALL_MOE)).reference, cached)


def test_commands_find_ship_and_use_it(
    plan: Plan,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BITPLAN_CACHE", str(store.root))
    model, plan_path, packed = str(SMALL_MOE), tmp_path / "plan.json", tmp_path / "packed"
    file = tmp_path / "prefix.safetensors"
    save_plan(plan, plan_path)
    search = ("--length", "2", "--candidates", "24", "--out", str(file))
    assert run(["prefix", model, "--plan", str(plan_path), *search, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tokens"] == load_prefix(file).tokens.tolist()
    assert run(["prefix", model, "--plan", str(plan_path), *search]) == 0
    assert "plan behind the prefix" in capsys.readouterr().out
    assert run(["apply", model, "--plan", str(plan_path), "--out", str(packed), "--prefix", str(file)]) == 0
    assert load_prefix(packed / PREFIX_FILE).tokens.tolist() == document["tokens"]
    capsys.readouterr()
    assert run(["generate", str(packed), "--prompt", "The compiler", "--max-new-tokens", "12"]) == 0
    printed = capsys.readouterr().out.strip()
    loaded, tokenizer = allocator.load(packed)
    shown = generate_text(loaded, tokenizer, "The compiler", max_new_tokens=12, prefix=load_prefix(file))
    assert printed == shown.strip()
    assert shown.startswith("The compiler")


def test_generation_behind_a_prefix_is_generation_behind_its_tokens(found: PrefixFound) -> None:
    assert found.prefix is not None
    reference = Model(str(SMALL_MOE)).reference
    model, tokenizer = reference.model, reference.tokenizer
    prompt = tokenizer("The compiler", return_tensors="pt").input_ids
    whole = torch.cat([found.prefix.tokens[None], prompt], dim=1)
    expected = model.generate(whole, max_new_tokens=8, do_sample=False, pad_token_id=1)[0, len(found.prefix.tokens) :]
    shown = generate_text(model, tokenizer, "The compiler", max_new_tokens=8, prefix=found.prefix)
    assert shown == tokenizer.decode(expected, skip_special_tokens=True)
