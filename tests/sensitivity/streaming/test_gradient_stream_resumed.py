"""An interrupt loses one step at most, and nothing that is taken up gives another number."""

import copy
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from sensitivity.streaming.stream_files import GRADIENT, HIDDEN, RESULT
from tests.sensitivity.streamed_models import make_candidates, measure_streamed
from tests.tiny_models import build_tiny_mixtral

STEPS = 7  # hidden states 0, 1 and 2, the head, layers 1 and 0, all outside of the layers


@pytest.fixture(scope="module")
def mixtral() -> PreTrainedModel:
    return build_tiny_mixtral().requires_grad_(False)


@pytest.fixture(scope="module")
def sketch(mixtral: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float32]:
    """The sketch of a measurement that nothing interrupted."""
    return measure_streamed(mixtral, tmp_path_factory.mktemp("whole"))


class Interrupt:
    """Raises ``KeyboardInterrupt`` when so many steps are done, and keeps all calls."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.calls: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))
        if done == self.at:
            raise KeyboardInterrupt


def list_files(directory: Path) -> set[str]:
    return {path.name.removesuffix(".safetensors") for path in directory.iterdir()}


def name_files(kind: str, *indices: int) -> set[str]:
    return {f"{kind}_{index:05d}" for index in indices}


RESULTS = name_files(RESULT, 0, 1, 2)


def describe(model: PreTrainedModel) -> list[Any]:
    return [
        [(name, id(module)) for name, module in model.named_modules()],
        [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()],
        [getattr(module, "padding_idx", None) for module in model.modules()],
    ]


@pytest.mark.parametrize("step", range(STEPS + 1))
def test_interrupt_between_steps(
    mixtral: PreTrainedModel, sketch: NDArray[np.float32], tmp_path: Path, step: int
) -> None:
    before, weights = describe(mixtral), copy.deepcopy(mixtral.state_dict())
    with pytest.raises(KeyboardInterrupt):
        measure_streamed(mixtral, tmp_path, Interrupt(step))
    assert describe(mixtral) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in mixtral.state_dict().items())
    rest = Interrupt()
    np.testing.assert_array_equal(measure_streamed(mixtral, tmp_path, rest), sketch)
    assert rest.calls == [(done, STEPS) for done in range(step, STEPS + 1)]
    assert list_files(tmp_path) == RESULTS


def test_files_go_when_no_step_needs_them(mixtral: PreTrainedModel, tmp_path: Path) -> None:
    seen: list[set[str]] = []
    measure_streamed(mixtral, tmp_path, lambda *_: seen.append(list_files(tmp_path)))
    hidden = name_files(HIDDEN, 0, 1, 2)
    assert seen[3] == hidden
    assert seen[4] == hidden | name_files(GRADIENT, 2)
    assert seen[5] == name_files(HIDDEN, 0, 2) | name_files(GRADIENT, 1) | name_files(RESULT, 1)
    assert seen[6] == name_files(HIDDEN, 2) | name_files(GRADIENT, 0) | name_files(RESULT, 0, 1)
    assert seen[7] == list_files(tmp_path) == RESULTS


# Runs of the model by its head: one to see the calls, one for each of five sequences, and five more at the end.
@pytest.mark.parametrize("runs", [1, 3, 6, 8, 11])
def test_interrupt_within_a_step(
    mixtral: PreTrainedModel, sketch: NDArray[np.float32], tmp_path: Path, runs: int
) -> None:
    before = describe(mixtral)
    interrupt = Interrupt(runs)
    hook = mixtral.lm_head.register_forward_hook(lambda *_: interrupt(len(interrupt.calls) + 1, 0))
    with pytest.raises(KeyboardInterrupt):
        measure_streamed(mixtral, tmp_path)
    hook.remove()
    assert describe(mixtral) == before
    np.testing.assert_array_equal(measure_streamed(mixtral, tmp_path), sketch)


def test_finished_measurement_is_not_measured_again(sketch: NDArray[np.float32], tmp_path: Path) -> None:
    model = build_tiny_mixtral().requires_grad_(False)
    candidates = make_candidates(model)
    measure_streamed(model, tmp_path, candidates=candidates)
    # With such weights nothing can be measured.
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    calls = Interrupt()
    np.testing.assert_array_equal(measure_streamed(model, tmp_path, calls, candidates=candidates), sketch)
    assert calls.calls == [(STEPS, STEPS)]


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_damaged_and_leftover_files(
    mixtral: PreTrainedModel, sketch: NDArray[np.float32], tmp_path: Path, step: int
) -> None:
    for damage in sorted(list_files_after(mixtral, tmp_path / "seen", step)):
        directory = tmp_path / damage
        if step < STEPS:
            with pytest.raises(KeyboardInterrupt):
                measure_streamed(mixtral, directory, Interrupt(step))
        else:
            measure_streamed(mixtral, directory)
        path = directory / f"{damage}.safetensors"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        (directory / f".{damage}.safetensors.abc.tmp").write_bytes(b"left by a kill")
        np.testing.assert_array_equal(measure_streamed(mixtral, directory), sketch, err_msg=damage)
        assert list_files(directory) == RESULTS


def list_files_after(model: PreTrainedModel, directory: Path, step: int) -> set[str]:
    seen: dict[int, set[str]] = {}
    measure_streamed(model, directory, lambda done, _: seen.update({done: list_files(directory)} if done else {}))
    return seen[step]


def test_killed_measurement_is_taken_up(sketch: NDArray[np.float32], mixtral: PreTrainedModel, tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    generator = random.Random(0)
    progress: list[int] = []
    # Each process is killed a moment after it has made one step of progress; some get further, none gets through.
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-m", "tests.sensitivity.streamed_models", str(tmp_path)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            first = int(process.stdout.readline())
            if first < STEPS - 1:
                process.stdout.readline()
            time.sleep(generator.uniform(0, 0.01))
            process.kill()
            progress.append(first)
    assert progress == sorted(progress)
    assert progress[-1] > 0
    np.testing.assert_array_equal(measure_streamed(mixtral, tmp_path), sketch)
    assert list_files(tmp_path) == RESULTS
