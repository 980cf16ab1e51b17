"""From a measured mixture of experts to a file that llama.cpp runs, and what a format for each block costs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader

import allocator
from allocator.budget import Budget
from allocator.notes import list_notes
from allocator.store import Store
from runtime.apply import simulated_formats
from runtime.loading import load_reference
from sensitivity.profile import SensitivityProfile
from tests.llama_cpp_client import loaded
from tests.tiny_measurements import CONFIG, make_request
from tests.tiny_models import sample_text

FORMATS = ("q4_0", "q5_1", "q8_0", "mxfp4", "int4_g64", "int8_g64_sym", "bf16")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def profile(tiny_mixtral_dir: Path, tiny_text: Path, store: Store) -> SensitivityProfile:
    config = allocator.MeasureConfig(**{**vars(CONFIG), "metrics": ("fisher",), "fit_plans": None})
    request = make_request(tiny_text, formats=FORMATS, embedding_formats=FORMATS, config=config)
    return allocator.measure(str(tiny_mixtral_dir), request=request, store=store)


def formats_by_block(plan: allocator.Plan, block: str) -> list[set[str]]:
    """Returns the formats of each layer's experts, of one projection where it is named."""
    return [{f for name, f in plan.weights.items() if f"layers.{layer}.mlp.experts{block}" in name} for layer in (0, 1)]


def test_a_mixture_runs_in_llama_cpp(
    profile: SensitivityProfile, tiny_mixtral_dir: Path, store: Store, tmp_path: Path
) -> None:
    budget = Budget(bits_per_weight=6.5)
    plan = allocator.plan(str(tiny_mixtral_dir), budget, engine="llama.cpp", profile=profile, store=store, verify=False)
    for block in (".gate_up_proj", ".down_proj"):
        assert all(len(found) == 1 for found in formats_by_block(plan, block))
    assert plan.rules is not None
    assert plan.rules.predicted_kl > plan.rules.unrestricted_kl
    exported = allocator.export(str(tiny_mixtral_dir), plan, "llama.cpp", tmp_path / "out", store=store)
    # The budget is one of the finished file: predicted before anything was written.
    assert exported.files["model.gguf"] == exported.predicted_bytes == plan.memory_bytes
    path = tmp_path / "out" / "model.gguf"
    stacks = [t for t in GGUFReader(path).tensors if t.name.endswith("_exps.weight")]
    assert len(stacks) == 6 and all(len(t.shape) == 3 for t in stacks)
    reference = load_reference(str(tiny_mixtral_dir))
    tokens = torch.tensor(reference.tokenizer(sample_text(200)).input_ids)
    with torch.no_grad(), simulated_formats(reference.model, plan.weights):
        ours = reference.model(tokens[None]).logits[0].argmax(-1).numpy()
    with loaded(path) as engine:
        theirs = engine.logits(tokens.numpy()).argmax(-1)
    # Activations are rounded to 8 bits there: ties between tokens fall otherwise now and then.
    assert np.mean(ours == theirs) > 0.9
    # The same plan in bitplan's own file, which has another header.
    applied = allocator.apply(str(tiny_mixtral_dir), plan, tmp_path / "packed", store=store)
    assert applied.file_bytes == applied.predicted_bytes != plan.memory_bytes


def test_vllm_gives_each_layers_experts_one_format(
    profile: SensitivityProfile, tiny_mixtral_dir: Path, store: Store
) -> None:
    budget = Budget(bits_per_weight=8.0)
    plan = allocator.plan(str(tiny_mixtral_dir), budget, engine="vllm", profile=profile, store=store)
    assert all(len(found) == 1 for found in formats_by_block(plan, ""))
    assert plan.rules is not None
    evaluations = allocator.evaluate(str(tiny_mixtral_dir), plan, store=store)
    # The report says what the rule costs against a format for every expert.
    assert plan.rules.describe() in list_notes(profile, plan, evaluations)


def test_routers_that_take_formats_are_counted_once(tiny_mixtral_dir: Path, tiny_text: Path, tmp_path: Path) -> None:
    config = allocator.MeasureConfig(**{**vars(CONFIG), "metrics": ("weight_error",), "fit_plans": None})
    formats, store = ("q4_0", "q8_0", "bf16"), Store(tmp_path / "store")
    request = make_request(tiny_text, formats=formats, embedding_formats=formats, routers=True, config=config)
    model = str(tiny_mixtral_dir)
    profile = allocator.measure(model, request=request, store=store)
    assert any(unit.kind == "router" for unit in profile.candidates.units)
    budget = Budget(bits_per_weight=9.0)
    plan = allocator.plan(model, budget, engine="llama.cpp", profile=profile, store=store, verify=False)
    # In llama.cpp's file and in our own: a router is among the weights, and no longer among what is left.
    exported = allocator.export(model, plan, "llama.cpp", tmp_path / "gguf", store=store)
    assert exported.files["model.gguf"] == exported.predicted_bytes
    applied = allocator.apply(model, plan, tmp_path / "packed", store=store)
    assert applied.file_bytes == applied.predicted_bytes
    reference = load_reference(model)
    tokens = torch.tensor(reference.tokenizer(sample_text(100)).input_ids)
    with loaded(tmp_path / "gguf" / "model.gguf") as engine:
        assert np.isfinite(engine.logits(tokens.numpy())).all()


def test_an_importance_matrix_is_written_beside_the_file(
    profile: SensitivityProfile, tiny_mixtral_dir: Path, store: Store, tmp_path: Path
) -> None:
    model, budget = str(tiny_mixtral_dir), Budget(bits_per_weight=9.0)
    plan = allocator.plan(model, budget, engine="llama.cpp", profile=profile, store=store, verify=False)
    exported = allocator.export(model, plan, "llama.cpp", tmp_path / "out", imatrix=True, store=store)
    assert "imatrix.gguf" in exported.files
    names = {tensor.name for tensor in GGUFReader(tmp_path / "out" / "imatrix.gguf").tensors}
    assert {"blk.1.ffn_down_exps.weight.in_sum2", "blk.1.ffn_down_exps.weight.counts"} <= names
    with pytest.raises(ValueError, match="an importance matrix is a file of llama.cpp's: got engine='transformers'"):
        allocator.export(model, plan, "transformers", tmp_path / "other", imatrix=True, store=store)
    with pytest.raises(ValueError, match="of the plan's profile, which must be stored: got none of"):
        allocator.export(model, plan, "llama.cpp", tmp_path / "other", imatrix=True, store=Store(tmp_path / "empty"))
