"""Bytes of engines' files noted beside a profile: those that a plan counts from the model itself."""

from pathlib import Path

import pytest

import allocator
from allocator.budget import Budget
from allocator.engine_files import note_engine_files, noted_fixed_bytes
from allocator.store import ENGINE_FILES, Store
from runtime.engines import ENGINES, find_engine
from sensitivity.profile import SensitivityProfile


@pytest.fixture
def noted(tiny_llama_dir: Path, tiny_profile: SensitivityProfile, tmp_path: Path) -> Store:
    store = Store(tmp_path)
    note_engine_files(allocator.Model(str(tiny_llama_dir)), tiny_profile, store)
    return store


@pytest.mark.parametrize("engine", ["llama.cpp", "onnxruntime", "vllm", "mlx-lm"])
def test_what_is_noted_is_what_a_plan_of_the_model_counts(
    engine: str, noted: Store, tiny_llama_dir: Path, tiny_profile: SensitivityProfile
) -> None:
    planned = allocator.plan(
        str(tiny_llama_dir), Budget(bits_per_weight=16.0), verify=False, profile=tiny_profile, engine=engine
    )
    assert noted_fixed_bytes(find_engine(engine), tiny_profile, noted) == planned.fixed_bytes
    # A packed model's file has other bytes, so the note is worth its while.
    assert planned.fixed_bytes != tiny_profile.fixed_bytes


def test_an_engine_whose_file_is_not_known_beforehand_has_none(noted: Store, tiny_profile: SensitivityProfile) -> None:
    assert noted_fixed_bytes(find_engine("gptqmodel"), tiny_profile, noted) is None
    assert set(noted.find_note(ENGINE_FILES, tiny_profile.fingerprint) or {}) == set(ENGINES)


def test_what_was_not_noted_is_said(tiny_profile: SensitivityProfile, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"counts the bytes of its file.*Submit its job 'measure'"):
        noted_fixed_bytes(find_engine("llama.cpp"), tiny_profile, Store(tmp_path))


def test_a_model_that_an_engine_has_no_file_of_is_refused(
    tiny_qwen_moe_dir: Path, tiny_profile: SensitivityProfile, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    note_engine_files(allocator.Model(str(tiny_qwen_moe_dir)), tiny_profile, store)
    with pytest.raises(ValueError, match=r"a model must be one of .* to be written as ONNX: got 'qwen2_moe'"):
        noted_fixed_bytes(find_engine("onnxruntime"), tiny_profile, store)
