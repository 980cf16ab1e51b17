"""Interrupted at any moment, a measurement leaves nothing half-written, goes on where it stopped, and ends the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from allocator.cli import run
from sensitivity.profile import SensitivityProfile
from sensitivity.profile_files import load_profile
from tests.end_to_end.commands import ROOT, finish, list_files, start
from tests.sensitivity.measured_models import assert_same
from tests.tiny_measurements import FLAGS


def list_pieces(cache: Path) -> list[str]:
    return [name for name in list_files(cache) if name.endswith(".safetensors")]


def wait_for_piece(cache: Path, piece: str) -> None:
    """Returns as soon as a piece is finished."""
    deadline = time.monotonic() + 60
    while not any(name.endswith(piece) for name in list_pieces(cache)):
        assert time.monotonic() < deadline, list_files(cache)
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("number", "piece"),
    [
        # Within the pass of the Fisher sketch, or soon after it; its own files come and go.
        (signal.SIGTERM, "/output_error.safetensors"),
        (signal.SIGINT, "/logit/00001.safetensors"),
        (signal.SIGKILL, "/fisher/sketch.safetensors"),
    ],
    ids=["SIGTERM", "SIGINT", "SIGKILL"],
)
def test_interrupted_measurement(
    number: signal.Signals,
    piece: str,
    tiny_llama_dir: Path,
    tiny_text: Path,
    tmp_path: Path,
    tiny_profile: SensitivityProfile,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "profile"
    arguments = ("measure", str(tiny_llama_dir), "--calibration", str(tiny_text), *FLAGS, "--out", str(out))
    process = start(*arguments, cache=cache)
    wait_for_piece(cache, piece)
    process.send_signal(number)
    code, printed, err = finish(process)
    kept = list_pieces(cache)
    assert any(name.endswith(piece) for name in kept) and all(name.startswith("pieces/") for name in kept)
    assert not out.exists()
    if number is signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert (code, printed) == (1, "")
        assert err.splitlines()[-1].startswith("interrupted; finished measurements are kept: run the same command")
        assert "Traceback" not in err
        assert list_files(cache) == kept
    monkeypatch.setenv("BITPLAN_CACHE", str(cache))
    assert run(arguments) == 0
    assert capsys.readouterr().out.startswith(f"profile {tiny_profile.fingerprint[:16]}")
    assert_same(load_profile(out), tiny_profile)
    assert sorted(p.name for p in out.iterdir()) == ["arrays.safetensors", "profile.json"]
    assert [Path(name).parts[0] for name in list_files(cache)] == ["latest", "profiles", "profiles"]


@pytest.mark.slow
@pytest.mark.parametrize("fixture", ["tiny_llama_dir", "tiny_qwen_moe_dir"])
def test_killed_ten_times_at_random_moments(
    fixture: str, request: pytest.FixtureRequest, tiny_text: Path, tmp_path: Path
) -> None:
    model = str(request.getfixturevalue(fixture))
    arguments = ("10", "3", str(tmp_path), model, "--calibration", str(tiny_text), *FLAGS)
    done = subprocess.run(
        [sys.executable, "-m", "tests.end_to_end.killed_measurements", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    killed, finished = map(int, done.stdout.split())
    assert killed == 10 and finished >= 1
    expected = load_file(tmp_path / "whole" / "arrays.safetensors")
    for n in range(finished):
        found = load_file(tmp_path / f"killed-{n}" / "arrays.safetensors")
        assert list(found) == list(expected)
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert_same(load_profile(tmp_path / f"killed-{n}"), load_profile(tmp_path / "whole"))
        assert not (tmp_path / f"cache-{n}" / "pieces").exists() or not list_pieces(tmp_path / f"cache-{n}" / "pieces")
