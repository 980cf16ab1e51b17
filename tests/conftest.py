"""What every test stands on: no network, few threads, and tiny models on disk."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from allocator.store import Store
    from sensitivity.profile import SensitivityProfile

# Read by the libraries when they are first imported, so they come before any of them.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "2",
}.items():
    os.environ.setdefault(_name, _value)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense decoder with a lm_head of its own."""
    from tests.tiny_models import build_tiny_llama, save_model

    return save_model(build_tiny_llama(), tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tiny_tied_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense decoder whose embedding and lm_head are one parameter."""
    from tests.tiny_models import build_tiny_llama, save_model

    return save_model(build_tiny_llama(tied=True), tmp_path_factory.mktemp("tiny_tied_llama"))


@pytest.fixture(scope="session")
def tiny_mixtral_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with fused 3-D expert parameters."""
    from tests.tiny_models import build_tiny_mixtral, save_model

    return save_model(build_tiny_mixtral(), tmp_path_factory.mktemp("tiny_mixtral"))


@pytest.fixture(scope="session")
def tiny_qwen_moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts with a shared expert and attention biases."""
    from tests.tiny_models import build_tiny_qwen_moe, save_model

    return save_model(build_tiny_qwen_moe(), tmp_path_factory.mktemp("tiny_qwen_moe"))


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text enough for every purpose of a tiny measurement."""
    from tests.tiny_models import sample_text

    path = tmp_path_factory.mktemp("tiny_text") / "calibration.txt"
    path.write_text(sample_text(12_000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> "Store":
    """The store that holds the tiny profile."""
    from allocator.store import Store

    return Store(tmp_path_factory.mktemp("tiny_store"))


@pytest.fixture(scope="session")
def tiny_profile(tiny_llama_dir: Path, tiny_text: Path, tiny_store: "Store") -> "SensitivityProfile":
    """The dense decoder, measured once by every metric."""
    import allocator
    from tests.tiny_measurements import make_request

    return allocator.measure(str(tiny_llama_dir), request=make_request(tiny_text), store=tiny_store)
