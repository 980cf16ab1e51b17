"""Models measured under transforms, the whole way: verified, applied, and reloaded without them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

import allocator
from allocator import Budget, Store
from allocator.artefacts import Model
from allocator.cli import run
from runtime.apply import simulated_formats
from runtime.kernels.dispatch import kernel_path
from sensitivity.evaluation import score_assignments
from tests.runtime.transforms.decoders import FLOAT32_TOLERANCE
from tests.tiny_measurements import CONFIG, FLAGS, make_request

CASES = [
    ("tiny_llama_dir", "hadamard,head_hadamard"),
    ("tiny_tied_llama_dir", "smoothquant,hadamard"),
    ("tiny_tied_llama_dir", "untie,pca"),
    ("tiny_mixtral_dir", "random_rotation,outliertune"),
    ("tiny_qwen_moe_dir", "exponent_bias,hadamard"),
]


@pytest.mark.parametrize(("directory", "names"), CASES)
def test_reloaded_model_is_the_simulated_one_to_the_bit(
    directory: str, names: str, tiny_text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, store = Model(str(request.getfixturevalue(directory))), Store(tmp_path / "store")
    asked = make_request(tiny_text, config=CONFIG, transforms=tuple(names.split(",")))
    profile = allocator.measure(model, request=asked, store=store)
    plan = allocator.plan(model, Budget(bits_per_weight=4.0), profile=profile, store=store)
    applied = allocator.apply(model, plan, tmp_path / "packed", store=store)
    assert applied.file_bytes == applied.predicted_bytes == (tmp_path / "packed" / "model.safetensors").stat().st_size
    packed, tokenizer = allocator.load(tmp_path / "packed")
    tokens = tokenizer("The compiler reads a source file and writes", return_tensors="pt").input_ids
    rewritten = model.reference_of(plan, store).model
    with torch.no_grad(), simulated_formats(rewritten, plan.weights):
        expected = rewritten(tokens, use_cache=False).logits
    with torch.no_grad():
        with kernel_path("reference"):
            assert torch.equal(packed(tokens, use_cache=False).logits, expected)
        # A cache, as in generation.
        generated = packed.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape[1] == tokens.shape[1] + 4


@pytest.mark.parametrize("names", ["hadamard,head_hadamard", "smoothquant", "untie,pca"])
def test_divergence_is_that_to_the_model_before(
    names: str, tiny_tied_llama_dir: Path, tiny_text: Path, tmp_path: Path
) -> None:
    """Plans are measured against the rewritten reference; against the one of the files it is the same up to rounding.

    KL sums p (log p - log q); a logit moved by at most e moves log p and log q by 2 e, and p by a part of 2 e: with the
    differences |log p - log q| below 4 nats, 4 e + 2 e * 4 in all.
    """
    model, store = Model(str(tiny_tied_llama_dir)), Store(tmp_path)
    profile = allocator.measure(model, request=make_request(tiny_text, transforms=tuple(names.split(","))), store=store)
    plan = allocator.plan(model, Budget(bits_per_weight=4.0), profile=profile, store=store)
    rewritten, tokens = model.reference_of(plan, store).model, torch.from_numpy(profile.selection_tokens)
    measured = score_assignments(rewritten, {"plan": plan.weights, "none": {}}, tokens)
    with torch.no_grad():
        before = [torch.log_softmax(model.reference.model(s[None]).logits[0].double(), -1) for s in tokens]
        untouched = [torch.log_softmax(rewritten(s[None]).logits[0].double(), -1) for s in tokens]
        with simulated_formats(rewritten, plan.weights):
            after = [torch.log_softmax(rewritten(s[None]).logits[0].double(), -1) for s in tokens]
    e = max(float((p - q).abs().max()) for p, q in zip(before, untouched, strict=True))
    assert e <= 2 * FLOAT32_TOLERANCE
    assert max(float((p - q).abs().max()) for p, q in zip(before, after, strict=True)) <= 4
    divergence = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in zip(before, after, strict=True)]
    assert max(abs(measured["plan"].kl - divergence)) <= 12 * e
    assert plan.shipped is not None and plan.shipped.kl == pytest.approx(sum(divergence) / len(divergence), abs=12 * e)


def test_scales_and_codes_that_no_text_has_seen(tiny_tied_llama_dir: Path, tiny_text: Path, tmp_path: Path) -> None:
    """Two models measured on different texts have the same file for llama.cpp, and its importance matrix."""
    text, written = tiny_text.read_text(encoding="utf-8"), []
    formats, config = ("q4_0", "q5_1", "q8_0"), replace(CONFIG, quantizer="drawn_clipping", metrics=("fisher",))
    for name, part in {"first": text[:6000], "second": text[6000:]}.items():
        (tmp_path / f"{name}.txt").write_text(part, encoding="utf-8")
        model, store = Model(str(tiny_tied_llama_dir)), Store(tmp_path / name)
        asked = make_request(
            tmp_path / f"{name}.txt",
            formats=formats,
            embedding_formats=formats,
            config=replace(config, fit_plans=None),
            transforms=("equalize",),
        )
        profile = allocator.measure(model, request=asked, store=store)
        budget = Budget(bits_per_weight=4.5)  # all of them at q4_0: the allocation does read text
        plan = allocator.plan(model, budget, engine="llama.cpp", profile=profile, store=store, verify=False)
        assert set(plan.weights.values()) == {"q4_0"}
        exported = allocator.export(model, plan, "llama.cpp", tmp_path / f"{name}-gguf", imatrix=True, store=store)
        assert exported.files["model.gguf"] == exported.predicted_bytes
        written.append([(exported.directory / file).read_bytes() for file in ("model.gguf", "imatrix.gguf")])
    assert written[0] == written[1]
    matrix = GGUFReader(tmp_path / "first-gguf" / "imatrix.gguf")
    assert matrix.fields["imatrix.datasets"].contents() == ["tokens drawn from the vocabulary"]


def test_commands(
    tiny_tied_llama_dir: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "store"))
    model, plan_path = str(tiny_tied_llama_dir), str(tmp_path / "plan.json")
    few = ("--metrics", "fisher", "--fit-plans", "none", "--transform", "smoothquant:alpha=0.6,hadamard")
    commands = (
        ("measure", model, "--calibration", str(tiny_text), *FLAGS, *few),
        ("plan", model, "--bits-per-weight", "4", "--out", plan_path),
        ("apply", model, "--plan", plan_path, "--out", str(tmp_path / "packed")),
        ("evaluate", model, "--plan", plan_path),
        ("report", model, "--plan", plan_path, "--out", str(tmp_path / "report")),
        ("generate", str(tmp_path / "packed"), "--prompt", "The", "--max-new-tokens", "3"),
    )
    printed = []
    for command in commands:
        assert run(command) == 0, capsys.readouterr().err
        printed.append(capsys.readouterr().out)
    assert "under the transforms smoothquant:alpha=0.6:sites=all,hadamard:seed=0 (4096 weights added)" in printed[1]
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "smoothquant:alpha=0.6" in page and "4096 of them" in page
    # The plan is of no use where what the transforms found is gone.
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "empty"))
    assert run(commands[2]) == 1
    assert "found must be kept, or the profile" in capsys.readouterr().err


@pytest.mark.parametrize("names", ["haddamard", "hadamard:alpha=1"])
def test_wrong_names_are_wrong_usage(names: str, capsys: pytest.CaptureFixture[str], tiny_llama_dir: Path) -> None:
    assert run(["measure", str(tiny_llama_dir), "--transform", names]) == 2
    assert "must be" in capsys.readouterr().err


def test_help_names_every_transform(capsys: pytest.CaptureFixture[str]) -> None:
    from runtime.transforms import TRANSFORMS

    assert run(["measure", "--help"]) == 0
    words = capsys.readouterr().out.replace(",", " ").replace(".", " ").split()
    assert set(TRANSFORMS) <= set(words)
