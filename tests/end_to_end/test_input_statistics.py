"""Quantizers that read input statistics, the whole way: measured, verified, applied and reloaded, always the same."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import allocator
from allocator import Budget, Plan, SensitivityProfile, Store
from allocator.artefacts import Model
from allocator.cli import run
from allocator.renderings import rendering_of_plan
from runtime.apply import simulated_formats
from runtime.kernels.dispatch import kernel_path
from runtime.quantizers import STATISTICAL
from tests.tiny_measurements import CONFIG, FLAGS, make_request

MODELS = ("tiny_llama_dir", "tiny_tied_llama_dir", "tiny_mixtral_dir")
BUDGET = Budget(bits_per_weight=3.6)
FEW = replace(CONFIG, fit_plans=None, metrics=("fisher",), quantizer="gptq")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A model, a plan of it with the profile it was made from, and their store."""

    model: Model
    profile: SensitivityProfile
    plan: Plan
    store: Store


@pytest.fixture(scope="module", params=MODELS)
def planned(request: pytest.FixtureRequest, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Planned:
    model, store = Model(str(request.getfixturevalue(request.param))), Store(tmp_path_factory.mktemp("store"))
    asked = make_request(tiny_text, config=replace(CONFIG, quantizer="gptq"))
    profile = allocator.measure(model, request=asked, store=store)
    made = allocator.plan(model, BUDGET, profile=profile, store=store)
    return Planned(model=model, profile=profile, plan=made, store=store)


def test_plan_beats_that_of_round_to_nearest(planned: Planned, tiny_text: Path) -> None:
    """The layer-local error that GPTQ lowers is not the KL, but on these models it comes with it."""
    profile = allocator.measure(planned.model, request=make_request(tiny_text), store=planned.store)
    nearest = allocator.plan(planned.model, BUDGET, profile=profile, store=planned.store)
    assert planned.plan.shipped is not None and nearest.shipped is not None
    assert planned.plan.shipped.kl < nearest.shipped.kl
    assert planned.plan.provenance["quantizer"] == "gptq"


def test_reloaded_model_is_the_simulated_one_to_the_bit(planned: Planned, tmp_path: Path) -> None:
    packed_dir = tmp_path / "packed"
    applied = allocator.apply(planned.model, planned.plan, packed_dir, store=planned.store)
    assert applied.file_bytes == applied.predicted_bytes
    packed, tokenizer = allocator.load(packed_dir)
    tokens = tokenizer("The compiler reads a source file and writes", return_tensors="pt").input_ids
    reference = planned.model.reference.model
    rule = rendering_of_plan(planned.plan, reference, planned.store)
    with torch.no_grad(), kernel_path("reference"):
        with simulated_formats(reference, planned.plan.weights, quantizer=rule):
            expected = reference(tokens, use_cache=False).logits
        with simulated_formats(reference, planned.plan.weights):
            assert not torch.equal(reference(tokens, use_cache=False).logits, expected)
        assert torch.equal(packed(tokens, use_cache=False).logits, expected)


def test_plan_is_applied_alike_without_its_statistics(planned: Planned, tmp_path: Path) -> None:
    other = Store(tmp_path / "store")
    inputs = [s.rendering(planned.profile.fingerprint) / "inputs.safetensors" for s in (planned.store, other)]
    other.save_profile(planned.profile)
    allocator.apply(planned.model, planned.plan, tmp_path / "kept", store=planned.store)
    allocator.apply(planned.model, planned.plan, tmp_path / "collected", store=other)
    contents = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("kept", "collected")}
    assert contents["kept"] == contents["collected"]
    assert inputs[0].read_bytes() == inputs[1].read_bytes()
    # And without the profile, as long as the statistics are there.
    shutil.rmtree(tmp_path / "store" / "profiles")
    allocator.apply(planned.model, planned.plan, tmp_path / "kept", store=other)
    assert (tmp_path / "kept" / "model.safetensors").read_bytes() == contents["kept"]


def test_evaluation_and_report(planned: Planned, tmp_path: Path) -> None:
    reference, shipped, *_ = allocator.evaluate(planned.model, planned.plan, store=planned.store)
    assert reference.kl == 0.0 < shipped.kl
    assert allocator.report(planned.model, planned.plan, tmp_path, store=planned.store).exists()


def test_what_is_gone_is_named(planned: Planned, tiny_text: Path, tmp_path: Path) -> None:
    empty = Store(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"what was known of the inputs must be kept.*Measure again"):
        allocator.apply(planned.model, planned.plan, tmp_path / "packed", store=empty)
    assert not (tmp_path / "packed").exists()
    # Statistics of another profile would render other weights than those of the plan.
    with pytest.raises(ValueError, match="the profile a plan was made from must be stored"):
        allocator.evaluate(planned.model, planned.plan, text=str(tiny_text), sequences=2, store=empty)


def test_scores_of_other_statistics_are_others(tiny_llama_dir: Path, tiny_text: Path, tmp_path: Path) -> None:
    """Two profiles of one model, of more and of fewer calibration sequences, give one plan two scores."""
    model, store = Model(str(tiny_llama_dir)), Store(tmp_path)
    kl = []
    for sequences in (6, 4):
        config = replace(FEW, fisher_sequences=sequences)
        profile = allocator.measure(model, request=make_request(tiny_text, config=config), store=store)
        pinned = allocator.plan(model, BUDGET, profile=profile, store=store)
        kl.append({e.name: e.kl for e in pinned.evaluations}["uniform int2_g64"])
    assert kl[0] != kl[1]


@pytest.mark.parametrize("quantizer", sorted(STATISTICAL - {"gptq"}))
def test_other_quantizers_and_refinement(quantizer: str, tiny_llama_dir: Path, tiny_text: Path, tmp_path: Path) -> None:
    model, store = Model(str(tiny_llama_dir)), Store(tmp_path / "store")
    asked = make_request(tiny_text, formats=("int2_g64", "int4_g64"), config=replace(FEW, quantizer=quantizer))
    profile = allocator.measure(model, request=asked, store=store)
    made = allocator.plan(model, BUDGET, profile=profile, store=store, refine=int(quantizer == "coordinate_descent"))
    allocator.apply(model, made, tmp_path / "packed", store=store)
    assert made.shipped is not None
    packed, _ = allocator.load(tmp_path / "packed")
    rule = rendering_of_plan(made, model.reference.model, store)
    tokens = torch.from_numpy(profile.selection_tokens)[:1]
    with torch.no_grad(), simulated_formats(model.reference.model, made.weights, quantizer=rule):
        expected = model.reference.model(tokens, use_cache=False).logits
    with kernel_path("reference"):
        assert torch.equal(packed(tokens, use_cache=False).logits, expected)


def test_further_estimators_render_with_the_statistics(tiny_mixtral_dir: Path, tiny_text: Path, tmp_path: Path) -> None:
    metrics = ("weight_error", "output_error", "column_loss", "affinity_error", "output_fisher")
    tables = {}
    for quantizer in ("rtn", "gptq"):
        config = replace(FEW, quantizer=quantizer, metrics=metrics)
        asked = make_request(tiny_text, formats=("int4_g64",), config=config)
        tables[quantizer] = allocator.measure(str(tiny_mixtral_dir), request=asked, store=Store(tmp_path)).losses
    # What GPTQ lowers, at the price of the weight error.
    assert tables["gptq"]["output_error"].loss.sum() < tables["rtn"]["output_error"].loss.sum()
    assert tables["gptq"]["weight_error"].loss.sum() > tables["rtn"]["weight_error"].loss.sum()
    for metric in metrics[2:]:
        assert (tables["gptq"][metric].loss != tables["rtn"][metric].loss).any()


def test_commands(
    tiny_llama_dir: Path,
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The commands find in the default store what an earlier one kept there."""
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "store"))
    model, plan_path = str(tiny_llama_dir), str(tmp_path / "plan.json")
    few = ("--metrics", "fisher", "--fit-plans", "none", "--quantizer", "gptq")
    commands = (
        ("measure", model, "--calibration", str(tiny_text), *FLAGS, *few),
        ("plan", model, "--bits-per-weight", "3.6", "--no-verify", "--out", plan_path),
        ("apply", model, "--plan", plan_path, "--out", str(tmp_path / "packed")),
        ("evaluate", model, "--plan", plan_path),
        ("report", model, "--plan", plan_path, "--out", str(tmp_path / "report")),
    )
    for command in commands:
        assert run(command) == 0, capsys.readouterr().err
    [kept] = (tmp_path / "store" / "renderings").iterdir()
    assert {path.name for path in kept.iterdir()} == {"inputs.safetensors", "rendered"}
    assert (tmp_path / "report" / "report.html").exists()
