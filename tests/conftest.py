"""What every test stands on: no network, few threads, and tiny models on disk."""

import os
from pathlib import Path

import pytest

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
