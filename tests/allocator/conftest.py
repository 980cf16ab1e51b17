"""One thread, as matrices this small gain nothing by a second one; and a profile of weights and caches with a plan."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import allocator
from allocator.measuring import MeasureRequest
from allocator.plans import Plan
from allocator.store import Store
from sensitivity.profile import SensitivityProfile
from tests.tiny_measurements import CACHE_BUDGET, CACHE_FORMATS, make_request


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def cache_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="package")
def cache_request(tiny_text: Path) -> MeasureRequest:
    return make_request(tiny_text, cache_formats=CACHE_FORMATS)


@pytest.fixture(scope="package")
def cache_profile(tiny_llama_dir: Path, cache_request: MeasureRequest, cache_store: Store) -> SensitivityProfile:
    return allocator.measure(str(tiny_llama_dir), request=cache_request, store=cache_store)


@pytest.fixture(scope="package")
def cache_plan(tiny_llama_dir: Path, cache_profile: SensitivityProfile, cache_store: Store) -> Plan:
    """Verified."""
    return allocator.plan(str(tiny_llama_dir), CACHE_BUDGET, profile=cache_profile, store=cache_store)
