"""An interrupt loses one piece at most: what is finished is kept, and the rest gives the same numbers.

What a pass of the Fisher sketch has finished are files that come and go, see ``test_gradient_stream_resumed``; how far
it was shows in the first call of progress when it is taken up.
"""

import copy
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sensitivity.profile import SensitivityProfile
from tests.sensitivity.measured_models import Measurement, assert_same, make_config, make_measurement


def find_pieces(pieces: Path) -> set[Path]:
    return set(pieces.rglob("*.safetensors"))


def make_old(paths: set[Path]) -> None:
    """Gives files a time long past, so that one written again is told from one left alone."""
    for path in paths:
        os.utime(path, (0, 0))


def find_new_pieces(pieces: Path) -> set[Path]:
    return {path for path in find_pieces(pieces) if path.stat().st_mtime > 0}


def name_pieces(units: int) -> list[str]:
    """Returns the pieces of a finished measurement, in the order in which they are measured."""
    logit = [f"logit/{u:05d}" for u in range(units)]
    return ["weight_error", "output_error", "fisher/sketch", *logit, "fit/000", "fit/004"]


def list_names(pieces: Path, paths: set[Path] | None = None) -> set[str]:
    """Returns the names of pieces, but for the files of a pass that is not finished."""
    names = {
        str(path.relative_to(pieces).with_suffix("")) for path in (find_pieces(pieces) if paths is None else paths)
    }
    return {name for name in names if not name.startswith("fisher/stream/")}


class Calls:
    """Keeps every call, and raises ``KeyboardInterrupt`` in the n-th."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.interrupt_at = interrupt_at

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.calls.append((stage, done, total))
        if len(self.calls) == self.interrupt_at:
            raise KeyboardInterrupt

    def of(self, stage: str) -> list[int]:
        return [done for name, done, _ in self.calls if name == stage]


def assert_taken_up(measurement: Measurement, whole: SensitivityProfile, pieces: Path) -> Calls:
    """Resumes: the profile is that of a measurement in one go, and no finished piece is written again."""
    finished, names = find_pieces(pieces), list_names(pieces)
    make_old(finished)
    calls = Calls()
    assert_same(measurement.run(pieces, calls), whole)
    assert {str(p.relative_to(pieces)) for p in pieces.rglob("*") if p.is_file()} == {
        f"{name}.safetensors" for name in name_pieces(len(measurement.candidates.units))
    }
    assert not (pieces / "fisher" / "stream").exists()
    assert list_names(pieces, find_new_pieces(pieces)) == list_names(pieces) - names
    return calls


def describe(measurement: Measurement) -> dict[str, object]:
    """Returns what an interrupt must not leave changed in a model, weights aside."""
    model = measurement.reference.model
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [bool(parameter._post_accumulate_grad_hooks) for parameter in model.parameters()],
        "experts": model.config._experts_implementation,
    }


# Calls of a measurement: 2 + 2 for the errors, 8 for seven steps of the sketch, 16 for fifteen units, 3 for the plans.
@pytest.mark.parametrize("at", [1, 2, 4, 5, 8, 9, 11, 12, 13, 20, 28, 30, 31])
def test_measurement_interrupted_between_pieces_is_taken_up(
    measurement: Measurement, whole: SensitivityProfile, tmp_path: Path, at: int
) -> None:
    model = measurement.reference.model
    weights, before = copy.deepcopy(model.state_dict()), describe(measurement)
    calls = Calls(at)
    # The exception is kept, as a notebook keeps the last one: nothing may wait for its release.
    with pytest.raises(KeyboardInterrupt) as kept:
        measurement.run(tmp_path, calls)
    last = {stage: done for stage, done, _ in calls.calls}
    errors = last["weight_error"] + last.get("output_error", 0)
    # The sketch is written when its last step is done and told.
    sketch, plans = "single_unit_kl" in last, -(-last.get("prediction_fit", 0) // 4)
    finished = errors + sketch + last.get("single_unit_kl", 0) + plans
    assert list_names(tmp_path) == set(name_pieces(len(measurement.candidates.units))[:finished])
    assert describe(measurement) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    rest = assert_taken_up(measurement, whole, tmp_path)
    assert rest.of("fisher") == ([] if sketch else list(range(last.get("fisher", 0), 8)))
    del kept


# Runs of the model: 4 for the output error, 1 to see the layers, 4 and 4 by its head, 1 for the reference and 44 for
# the pairs, 1 + 4 and 1 + 1 for the plans.
@pytest.mark.parametrize("runs", [2, 5, 7, 12, 15, 40, 60, 65])
def test_measurement_interrupted_within_a_piece_is_taken_up(
    measurement: Measurement, whole: SensitivityProfile, tmp_path: Path, runs: int
) -> None:
    model = measurement.reference.model
    weights, before = copy.deepcopy(model.state_dict()), describe(measurement)
    interrupt = Calls(runs)
    hook = model.lm_head.register_forward_hook(lambda *_: interrupt("", 0, 0))
    with pytest.raises(KeyboardInterrupt) as kept:
        measurement.run(tmp_path, lambda *_: None)
    hook.remove()
    assert set() < list_names(tmp_path) < set(name_pieces(len(measurement.candidates.units)))
    assert describe(measurement) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert_taken_up(measurement, whole, tmp_path)
    del kept


def test_finished_measurement_is_not_measured_again(
    measurement: Measurement, whole: SensitivityProfile, tmp_path: Path
) -> None:
    measurement.run(tmp_path, lambda *_: None)
    # With such weights nothing can be measured.
    model = copy.deepcopy(measurement.reference.model)
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    without_weights = replace(measurement, reference=replace(measurement.reference, model=model))
    assert_taken_up(without_weights, whole, tmp_path)


@pytest.mark.parametrize("at", [9, 12, 14, 17])
def test_completed_measurement_interrupted_is_taken_up(measurement: Measurement, tmp_path: Path, at: int) -> None:
    few = replace(measurement, config=replace(measurement.config, logit_passes=13))
    whole = few.run(tmp_path / "whole", lambda *_: None)
    taken_up = tmp_path / "taken_up"
    with pytest.raises(KeyboardInterrupt):
        few.run(taken_up, Calls(at))
    finished = list_names(taken_up)
    make_old(find_pieces(taken_up))
    profile = few.run(taken_up, lambda *_: None)
    assert list_names(taken_up, find_new_pieces(taken_up)) == list_names(taken_up) - finished
    assert finished < list_names(taken_up) == list_names(tmp_path / "whole")
    for name, table in whole.losses.items():
        for part in ("loss", "std_error", "measured"):
            np.testing.assert_array_equal(getattr(profile.table(name), part), getattr(table, part))
    assert profile.prediction_fits == whole.prediction_fits
    # All that is not compared is how long the last run took.
    assert profile.provenance.keys() == whole.provenance.keys()
    assert {n for n, v in profile.provenance.items() if v != whole.provenance[n]} <= {"measured_in_s"}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99], ids=str)
@pytest.mark.parametrize("name", ["weight_error", "output_error", "fisher/sketch", "logit/00003", "fit/000"])
def test_half_written_piece_is_measured_again_and_no_other(
    measurement: Measurement, whole: SensitivityProfile, tmp_path: Path, name: str, share: float
) -> None:
    measurement.run(tmp_path, lambda *_: None)
    damaged = tmp_path / f"{name}.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[: int(share * len(content))])
    make_old(find_pieces(tmp_path))
    assert_same(measurement.run(tmp_path, lambda *_: None), whole)
    assert find_new_pieces(tmp_path) == {damaged}
    assert damaged.read_bytes() == content


def test_half_written_files_of_a_pass_are_made_again(
    measurement: Measurement, whole: SensitivityProfile, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        measurement.run(tmp_path, Calls(10))
    files = list((tmp_path / "fisher" / "stream").iterdir())
    assert len(files) > 2
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        (file.parent / f".{file.name}.abc.tmp").write_bytes(b"left by a kill")
    assert assert_taken_up(measurement, whole, tmp_path).of("fisher") == list(range(8))


def test_killed_measurement_is_taken_up(tiny_tied_llama_dir: Path, tmp_path: Path) -> None:
    # Many sequences, so that it is still measuring when it is killed.
    sequences = 100
    pieces, root = tmp_path / "killed", Path(__file__).parents[2]
    first = pieces / "fisher" / "stream" / "result_00001.safetensors"
    command = ["-m", "tests.sensitivity.measured_models", str(tiny_tied_llama_dir), str(pieces), str(sequences)]
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stderr=subprocess.PIPE,
    ) as process:
        try:
            while not first.exists() and process.poll() is None:
                time.sleep(0.001)
        finally:
            process.kill()
        errors = process.communicate()[1].decode()
    # 9 is SIGKILL: it did not end by itself.
    assert process.returncode == -9, errors
    measurement = make_measurement(tiny_tied_llama_dir, make_config(sequences))
    assert {"weight_error", "output_error"} <= list_names(pieces) < set(name_pieces(len(measurement.candidates.units)))
    rest = assert_taken_up(measurement, measurement.run(tmp_path / "whole", lambda *_: None), pieces)
    # It went on at the step it was in: at least five were done.
    assert 0 not in rest.of("fisher")
