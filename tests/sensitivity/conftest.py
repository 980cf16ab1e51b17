"""Every tiny model as a reference model is, in evaluation mode without gradients; and one measured in one go."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from sensitivity.profile import SensitivityProfile
from tests.sensitivity.measured_models import Measurement, make_config, make_measurement
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral, build_tiny_qwen_moe

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": build_tiny_llama,
    "tied_llama": partial(build_tiny_llama, tied=True),
    "mixtral": build_tiny_mixtral,
    "qwen_moe": build_tiny_qwen_moe,
}


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing by a second thread, and wait for it long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model of its own for each test."""
    return MODELS[request.param]().requires_grad_(False)


@pytest.fixture(scope="package")
def measurement(tiny_tied_llama_dir: Path) -> Measurement:
    """A model of its own for all tests of measuring, which leave it as it was."""
    return make_measurement(tiny_tied_llama_dir, make_config())


@pytest.fixture(scope="package")
def whole(measurement: Measurement, tmp_path_factory: pytest.TempPathFactory) -> SensitivityProfile:
    """The profile of a measurement that nothing interrupted."""
    return measurement.run(tmp_path_factory.mktemp("whole"), lambda *_: None)
