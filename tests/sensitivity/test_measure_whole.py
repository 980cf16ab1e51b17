"""A model that is not layer-wise gets its Fisher sketch from passes of the whole model, one sequence a piece."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from sensitivity.measure_config import FISHER
from sensitivity.profile import SensitivityProfile
from sensitivity.sketches.fisher_sketch import measure_fisher_sketch
from tests.sensitivity.measured_models import Measurement

STEPS, SEQUENCES = 7, 4


def hide_layers(model: Any) -> None:
    """Leaves the model without a list of as many layers as it says, so that it is refused before the first step."""
    model.config.num_hidden_layers = 3


def bypass_layers(model: Any) -> None:
    """Gives the second layer the input of the first one as well, which shows only when the logits are others."""
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[:] = [args[0]]

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] + inputs[0], *args[1:])

    model.model.layers[0].register_forward_pre_hook(keep)
    model.model.layers[1].register_forward_pre_hook(add)


# Change of the model, steps that are done before it is refused, and runs of the model that a refusal takes.
CASES: dict[str, tuple[Callable[[Any], None], int, int]] = {
    "no_list": (hide_layers, 0, 0),
    "bypass": (bypass_layers, 3, 2),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, measurement: Measurement) -> tuple[Measurement, int, int]:
    change, steps, runs = CASES[request.param]
    model = copy.deepcopy(measurement.reference.model)
    change(model)
    config = replace(measurement.config, metrics=(FISHER,), fit_plans=None)
    return replace(measurement, reference=replace(measurement.reference, model=model), config=config), steps, runs


class Runs:
    """Runs a measurement, and keeps its calls and how often the model ran; it ends when so many sequences are done."""

    def __init__(self, measurement: Measurement, pieces: Path, end: int | None = None) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.model_runs = 0
        self.profile: SensitivityProfile | None = None
        self._end = end
        hook = measurement.reference.model.lm_head.register_forward_hook(self._count)
        try:
            self.profile = measurement.run(pieces, self._call)
        except KeyboardInterrupt:
            assert end is not None
        finally:
            hook.remove()

    def _count(self, *_: object) -> None:
        self.model_runs += 1

    def _call(self, *call: Any) -> None:
        self.calls.append(call)
        if call[1:] == (self._end, SEQUENCES):
            raise KeyboardInterrupt


def test_sketch_is_that_of_the_whole_model(case: tuple[Measurement, int, int], tmp_path: Path) -> None:
    measurement, steps, runs = case
    model, candidates = measurement.reference.model, measurement.candidates
    found = Runs(measurement, tmp_path)
    assert found.profile is not None
    tokens = measurement.text.fisher.tokens
    sketch = np.stack(list(measure_fisher_sketch(model, candidates, tokens, seed=measurement.config.seed)))
    np.testing.assert_array_equal(found.profile.fisher_sketch, sketch)
    assert sketch.any()
    refused = [(FISHER, done, STEPS) for done in range(steps + 1)] if steps else []
    assert found.calls == refused + [(FISHER, done, SEQUENCES) for done in range(SEQUENCES + 1)]
    assert found.model_runs == runs + SEQUENCES
    assert [path.name for path in (tmp_path / FISHER).iterdir()] == ["sketch.safetensors"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    # Finished, it is neither measured nor refused again.
    again = Runs(measurement, tmp_path)
    assert (again.calls, again.model_runs) == ([], 0)


def test_interrupted_measurement_is_taken_up(case: tuple[Measurement, int, int], tmp_path: Path) -> None:
    measurement, _, runs = case
    whole = Runs(measurement, tmp_path / "whole")
    interrupted = Runs(measurement, tmp_path / "taken_up", end=2)
    assert interrupted.profile is None and interrupted.model_runs == runs + 2
    rest = Runs(measurement, tmp_path / "taken_up")
    assert rest.profile is not None and whole.profile is not None
    np.testing.assert_array_equal(rest.profile.fisher_sketch, whole.profile.fisher_sketch)
    # The two sequences that were left: it is not tried layer by layer again.
    assert rest.model_runs == 2
    assert rest.calls == [(FISHER, done, SEQUENCES) for done in range(SEQUENCES + 1)]
