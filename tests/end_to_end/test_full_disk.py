"""A disk without room: one message, nothing half-written, nothing finished lost."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from allocator.cli import run
from allocator.store import Store
from sensitivity.profile import SensitivityProfile
from sensitivity.profile_files import load_profile
from tests.end_to_end.commands import finish, list_files, start
from tests.sensitivity.measured_models import assert_same
from tests.tiny_measurements import FLAGS

DISK_BYTES = 64 * 1024


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where one may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount or "", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    yield place
    # Lazily: arrays that were read from it may still be mapped.
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def plan_path(
    tiny_store: Store,
    tiny_profile: SensitivityProfile,
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Path:
    monkeypatch.setenv("BITPLAN_CACHE", str(tiny_store.root))
    tiny_store.make_latest(tiny_profile)
    path = tmp_path / "plan.json"
    assert run(["plan", str(tiny_llama_dir), "--bits-per-weight", "8.6", "--no-verify", "--out", str(path)]) == 0
    capsys.readouterr()
    return path


def check_message(code: int, out: str, err: str, place: Path) -> None:
    assert (code, out) == (1, ""), err
    [line] = [line for line in err.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: the disk must have room: writing '{place}")
    assert line.endswith("Free some space and run the same command again; finished measurements are kept.")
    assert "Traceback" not in err


def test_apply_on_a_full_disk(
    small_disk: Path, plan_path: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(["apply", str(tiny_llama_dir), "--plan", str(plan_path), "--out", str(small_disk / "packed")])
    check_message(code, *capsys.readouterr(), small_disk)
    assert list(small_disk.iterdir()) == []


def test_measure_on_a_full_disk(
    small_disk: Path,
    tiny_llama_dir: Path,
    tiny_text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BITPLAN_CACHE", str(small_disk))
    code = run(["measure", str(tiny_llama_dir), "--calibration", str(tiny_text), *FLAGS])
    check_message(code, *capsys.readouterr(), small_disk)
    names = list_files(small_disk)
    assert names and all(name.startswith("pieces/") and name.endswith(".safetensors") for name in names)


def test_apply_where_not_even_the_tokenizer_fits(
    plan_path: Path, tiny_llama_dir: Path, tiny_store: Store, tmp_path: Path
) -> None:
    arguments = ("apply", tiny_llama_dir, "--plan", plan_path, "--out", tmp_path / "new" / "packed")
    finished = finish(start(*arguments, cache=tiny_store.root, most_file_bytes=2_000))
    check_message(*finished, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_measurement_goes_on_when_there_is_room_again(
    tiny_llama_dir: Path,
    tiny_text: Path,
    tiny_profile: SensitivityProfile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "profile"
    arguments = ("measure", str(tiny_llama_dir), "--calibration", str(tiny_text), *FLAGS, "--out", str(out))
    # More than most pieces, less than one of the logit sketch.
    check_message(*finish(start(*arguments, cache=cache, most_file_bytes=40_000)), cache)
    names = list_files(cache)
    assert names and all(name.startswith("pieces/") and ".tmp" not in name for name in names)
    assert not out.exists()
    monkeypatch.setenv("BITPLAN_CACHE", str(cache))
    assert run(arguments) == 0
    assert_same(load_profile(out), tiny_profile)
