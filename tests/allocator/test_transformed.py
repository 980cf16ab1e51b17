"""Rewritten reference models: the same again from the store, found again from text, and never another's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import allocator
from allocator import Budget, Plan, SensitivityProfile, Store
from allocator.artefact_match import ArtefactMismatch
from allocator.artefacts import Model, profile_of_plan
from allocator.cli_output import plan_text
from allocator.notes import list_notes
from allocator.progress import silent
from allocator.transformed import TRANSFORMS_CONTENT, TRANSFORMS_RECIPE, transform_, transform_again_
from tests.runtime.transforms.decoders import FLOAT32_TOLERANCE, compute_logits
from tests.tiny_measurements import CONFIG, make_request

NAMES = ("smoothquant", "pca:share=0.25", "head_hadamard")
TOKENS = torch.arange(96).view(4, 24)
FEW = replace(CONFIG, fit_plans=None, metrics=("fisher",))


@pytest.fixture(scope="module")
def model(tiny_tied_llama_dir: Path) -> Model:
    return Model(str(tiny_tied_llama_dir))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def profile(model: Model, tiny_text: Path, store: Store) -> SensitivityProfile:
    asked = make_request(tiny_text, config=FEW, transforms=NAMES)
    return allocator.measure(model, request=asked, store=store)


@pytest.fixture(scope="module")
def plan(profile: SensitivityProfile, model: Model, store: Store) -> Plan:
    return allocator.plan(model, Budget(bits_per_weight=4.0), profile=profile, store=store)


def test_the_record_says_what_was_before(model: Model, tmp_path: Path) -> None:
    before = model.reference
    rewritten = transform_(model.load_again(), ("hadamard",), TOKENS, Store(tmp_path))
    assert rewritten.transforms is not None
    assert rewritten.transforms.names == ("hadamard:seed=0",)
    assert rewritten.transforms.added_weights == 64**2
    assert rewritten.reference_bytes == before.reference_bytes
    assert rewritten.fingerprint == before.fingerprint
    assert rewritten.weights_fingerprint != before.weights_fingerprint == before.fingerprint
    assert (compute_logits(rewritten.model) - compute_logits(before.model)).abs().max() <= FLOAT32_TOLERANCE


def test_the_same_text_finds_the_same_and_keeps_it(model: Model, tmp_path: Path) -> None:
    first = transform_(model.load_again(), NAMES, TOKENS, Store(tmp_path))
    [kept] = (tmp_path / "transforms").iterdir()
    written = kept.stat().st_mtime_ns
    again = transform_(model.load_again(), NAMES, TOKENS, Store(tmp_path))
    assert first.weights_fingerprint == again.weights_fingerprint
    assert kept.stat().st_mtime_ns == written
    weights = again.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in first.model.state_dict().items())


@pytest.mark.parametrize("change", ["names", "options", "text"])
def test_anything_else_is_another_model(change: str, model: Model, tmp_path: Path) -> None:
    names = {"names": ("head_hadamard", "smoothquant"), "options": (*NAMES[:2], "head_hadamard:seed=1")}
    prints = {
        transform_(model.load_again(), asked, tokens, Store(tmp_path)).weights_fingerprint
        for asked, tokens in (
            (NAMES, TOKENS),
            (names.get(change, NAMES), TOKENS.flip(1) if change == "text" else TOKENS),
        )
    }
    assert len(prints) == 2


def test_provenance_names_the_transforms(profile: SensitivityProfile, plan: Plan, model: Model) -> None:
    named = "smoothquant:alpha=0.5:sites=all,pca:share=0.25:seed=0,head_hadamard:seed=0"
    assert profile.provenance["transforms"] == plan.provenance["transforms"] == named
    assert plan.provenance["model_fingerprint"] == model.fingerprint
    assert profile.reference_bytes == model.reference.reference_bytes
    assert f"under the transforms {named} (4096 weights added)" in plan_text(plan)


def test_plans_of_all_kinds_of_use_meet_the_same_weights(plan: Plan, model: Model, store: Store) -> None:
    held = model.reference_of(plan, store)
    assert held is model.reference_of(plan, store)
    fresh = transform_again_(model.load_again(), plan, store)
    weights = fresh.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in held.model.state_dict().items())


def test_a_lost_file_is_found_again_from_the_profile(plan: Plan, profile: SensitivityProfile, model: Model,
                                                     tmp_path: Path) -> None:  # fmt: skip
    other = Store(tmp_path)
    other.save_profile(profile)
    assert transform_again_(model.load_again(), plan, other).transforms == model.reference_of(plan, other).transforms


def test_a_lost_profile_is_named(plan: Plan, model: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"what the transforms 'smoothquant.*' found must be kept, or the profile"):
        allocator.apply(model, plan, tmp_path / "packed", store=Store(tmp_path / "empty"))
    assert not (tmp_path / "packed").exists()


def test_other_tensors_are_refused(plan: Plan, model: Model, store: Store, tmp_path: Path) -> None:
    other, recipe = Store(tmp_path / "store"), plan.provenance[TRANSFORMS_RECIPE]
    arrays = store.find_transforms(recipe)
    assert arrays is not None
    name = next(iter(arrays))
    other.save_transforms(recipe, {**arrays, name: np.nextafter(arrays[name], 9.0)})
    with pytest.raises(ArtefactMismatch, match=r"must be used with the transforms it was made under: got 'smoothquant"):
        allocator.apply(model, plan, tmp_path / "packed", store=other)
    assert not (tmp_path / "packed").exists()


def test_what_is_found_otherwise_is_refused(plan: Plan, model: Model, store: Store) -> None:
    changed = replace(plan, provenance={**plan.provenance, TRANSFORMS_CONTENT: "0" * 64})
    with pytest.raises(ArtefactMismatch, match="Measure again with the same settings, and plan from that"):
        model.reference_of(changed, store)


@pytest.mark.parametrize("rewritten", [True, False])
def test_profiles_of_other_transforms_are_refused(
    rewritten: bool, plan: Plan, profile: SensitivityProfile, model: Model, tiny_text: Path, tmp_path: Path
) -> None:
    """A plan whose own profile is gone falls back on the model's latest, which must be of the same weights."""
    other, bare = Store(tmp_path), Store(tmp_path / "bare")
    plain = allocator.measure(model, request=make_request(tiny_text, config=FEW), store=bare)
    plain_plan = allocator.plan(model, Budget(bits_per_weight=4.0), verify=False, profile=plain, store=bare)
    other.save_profile(plain if rewritten else profile)
    with pytest.raises(ArtefactMismatch, match="a plan must be used with a profile of the same transforms"):
        profile_of_plan(plan if rewritten else plain_plan, model, other, silent, own=False)


def test_scores_are_kept_apart(plan: Plan, model: Model, tiny_text: Path, store: Store) -> None:
    """The same uniform format of the rewritten and of the trained weights has two scores in one store."""
    plain = allocator.measure(model, request=make_request(tiny_text, config=FEW), store=store)
    made = allocator.plan(model, Budget(bits_per_weight=4.0), profile=plain, store=store)
    kl = [{e.name: e.kl for e in p.evaluations}["uniform int2_g64"] for p in (plan, made)]
    assert kl[0] != kl[1]


def test_the_reference_is_reported_as_it_was(plan: Plan, profile: SensitivityProfile, model: Model,
                                             store: Store) -> None:  # fmt: skip
    reference, *_ = evaluations = allocator.evaluate(model, plan, store=store)
    assert reference.memory_bytes == model.reference.reference_bytes
    assert reference.bits_per_weight == 32.0  # random weights, exact in float32 only
    notes = list_notes(profile, plan, evaluations)
    total = sum(unit.weights for unit in plan.units)
    assert f"The plan's weights are {total}, 4096 of them ({4096 / total:.2%}) added by that" in notes[0]


def test_models_read_block_by_block_are_refused(tiny_tied_llama_dir: Path, tmp_path: Path) -> None:
    reference = Model(str(tiny_tied_llama_dir), low_memory=True).load_again()
    with pytest.raises(ValueError, match=r"transforms rewrite all weights in memory: got 'hadamard:seed=0' for"):
        transform_(reference, ("hadamard",), TOKENS, Store(tmp_path))
