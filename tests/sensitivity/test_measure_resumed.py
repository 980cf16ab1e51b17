"""An interrupt loses one piece at most: what is finished is kept, and the rest gives the same numbers."""

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


def count_pieces(measurement: Measurement) -> int:
    return 2 + measurement.config.fisher_sequences + len(measurement.candidates.units)


class Interrupt:
    """Raises ``KeyboardInterrupt`` in the n-th call."""

    def __init__(self, after: int) -> None:
        self.remaining = after

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.remaining -= 1
        if self.remaining == 0:
            raise KeyboardInterrupt


def assert_taken_up(measurement: Measurement, whole: SensitivityProfile, pieces: Path) -> None:
    """Resumes: the profile is that of a measurement in one go, and no finished piece is written again."""
    finished = find_pieces(pieces)
    make_old(finished)
    assert_same(measurement.run(pieces, lambda *_: None), whole)
    assert len(find_pieces(pieces)) == count_pieces(measurement)
    assert find_new_pieces(pieces) == find_pieces(pieces) - finished


def describe(measurement: Measurement) -> dict[str, object]:
    """Returns what an interrupt must not leave changed in a model, weights aside."""
    model = measurement.reference.model
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": [bool(parameter._post_accumulate_grad_hooks) for parameter in model.parameters()],
        "experts": model.config._experts_implementation,
    }


# Calls of a measurement: 2 + 2 for the errors, 5 for four sequences, 16 for fifteen units.
@pytest.mark.parametrize("calls", [1, 2, 4, 5, 7, 9, 10, 14, 25])
def test_measurement_interrupted_between_pieces_is_taken_up(
    measurement: Measurement, whole: SensitivityProfile, tmp_path: Path, calls: int
) -> None:
    model = measurement.reference.model
    weights, before = copy.deepcopy(model.state_dict()), describe(measurement)
    # The exception is kept, as a notebook keeps the last one: nothing may wait for its release.
    with pytest.raises(KeyboardInterrupt) as kept:
        measurement.run(tmp_path, Interrupt(calls))
    # Each stage calls once before its first piece.
    assert len(find_pieces(tmp_path)) == calls - sum(calls >= first for first in (1, 3, 5, 10))
    assert describe(measurement) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert_taken_up(measurement, whole, tmp_path)
    del kept


# Runs of the model: 4 for the output error, 4 for the sequences, 1 for the reference and some 40 for the units.
@pytest.mark.parametrize("runs", [2, 6, 9, 20])
def test_measurement_interrupted_within_a_piece_is_taken_up(
    measurement: Measurement, whole: SensitivityProfile, tmp_path: Path, runs: int
) -> None:
    model = measurement.reference.model
    weights, before = copy.deepcopy(model.state_dict()), describe(measurement)
    interrupt = Interrupt(runs)
    hook = model.lm_head.register_forward_hook(lambda *_: interrupt("", 0, 0))
    with pytest.raises(KeyboardInterrupt) as kept:
        measurement.run(tmp_path, lambda *_: None)
    hook.remove()
    assert 0 < len(find_pieces(tmp_path)) < count_pieces(measurement)
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


@pytest.mark.parametrize("calls", [9, 10, 12, 17])
def test_completed_measurement_interrupted_is_taken_up(measurement: Measurement, tmp_path: Path, calls: int) -> None:
    few = replace(measurement, config=replace(measurement.config, logit_passes=13))
    whole = few.run(tmp_path / "whole", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        few.run(tmp_path / "taken_up", Interrupt(calls))
    finished = find_pieces(tmp_path / "taken_up")
    make_old(finished)
    profile = few.run(tmp_path / "taken_up", lambda *_: None)
    assert find_new_pieces(tmp_path / "taken_up") == find_pieces(tmp_path / "taken_up") - finished
    assert {p.name for p in finished} < {p.name for p in find_pieces(tmp_path / "whole")}
    for name, table in whole.losses.items():
        for part in ("loss", "std_error", "measured"):
            np.testing.assert_array_equal(getattr(profile.table(name), part), getattr(table, part))
    # All that is not compared is how long the last run took.
    assert profile.provenance.keys() == whole.provenance.keys()
    assert {n for n, v in profile.provenance.items() if v != whole.provenance[n]} <= {"measured_in_s"}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99], ids=str)
@pytest.mark.parametrize("name", ["weight_error", "output_error", "fisher/00001", "logit/00003"])
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


def test_killed_measurement_is_taken_up(tiny_tied_llama_dir: Path, tmp_path: Path) -> None:
    # Many sequences, so that it is still measuring when it is killed.
    sequences = 100
    pieces, root = tmp_path / "killed", Path(__file__).parents[2]
    command = ["-m", "tests.sensitivity.measured_models", str(tiny_tied_llama_dir), str(pieces), str(sequences)]
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stderr=subprocess.PIPE,
    ) as process:
        try:
            while len(find_pieces(pieces)) < 4 and process.poll() is None:
                time.sleep(0.001)
        finally:
            process.kill()
        errors = process.communicate()[1].decode()
    # 9 is SIGKILL: it did not end by itself.
    assert process.returncode == -9, errors
    assert 4 <= len(find_pieces(pieces)) < sequences
    measurement = make_measurement(tiny_tied_llama_dir, make_config(sequences))
    assert_taken_up(measurement, measurement.run(tmp_path / "whole", lambda *_: None), pieces)
