"""Files and directories are there whole or not at all."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.files import atomic_directory, atomic_path, write_text


class Interruption(BaseException):
    """Ends a body as Ctrl-C does."""


@pytest.fixture
def umask() -> Iterator[int]:
    """Permissions that a new file does not get."""
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def list_tree(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent
        temporary.write_text("whole")
    assert list_tree(tmp_path) == {"new/deep/file.txt": "whole"}


@pytest.mark.parametrize("error", [ValueError, Interruption])
@pytest.mark.parametrize("before", [{}, {"file.txt": "before"}], ids=["new", "there"])
def test_failure_leaves_the_file_as_it_was(error: type[BaseException], before: dict[str, str], tmp_path: Path) -> None:
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error), atomic_path(tmp_path / "file.txt") as temporary:
        temporary.write_text("half")
        raise error
    assert list_tree(tmp_path) == before


def test_file_is_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "file.txt", "first, and longer")
    write_text(tmp_path / "file.txt", "zweites ü")
    assert (tmp_path / "file.txt").read_bytes() == "zweites ü".encode()
    assert list_tree(tmp_path) == {"file.txt": "zweites ü"}


def test_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "directory"
    with atomic_directory(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file.txt").write_text("whole")
        assert not path.exists()
    assert list_tree(tmp_path) == {"new/directory/inner/file.txt": "whole"}


@pytest.mark.parametrize("error", [ValueError, Interruption])
@pytest.mark.parametrize("before", [{}, {"directory/file.txt": "before"}], ids=["new", "there"])
def test_failure_leaves_the_directory_as_it_was(
    error: type[BaseException], before: dict[str, str], tmp_path: Path
) -> None:
    for name, text in before.items():
        write_text(tmp_path / name, text)
    with pytest.raises(error), atomic_directory(tmp_path / "directory") as temporary:
        (temporary / "file.txt").write_text("half")
        raise error
    assert list_tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["directory"] * bool(before)


def test_directory_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "directory" / "old.txt", "old")
    with atomic_directory(tmp_path / "directory") as temporary:
        (temporary / "new.txt").write_text("new")
        assert list_tree(tmp_path / "directory") == {"old.txt": "old"}
    assert list_tree(tmp_path) == {"directory/new.txt": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["directory"]


def test_directory_named_by_a_link_is_replaced_where_it_is(tmp_path: Path) -> None:
    write_text(tmp_path / "disk" / "directory" / "old.txt", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "directory")
    with atomic_directory(tmp_path / "link") as temporary:
        (temporary / "new.txt").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert list_tree(tmp_path / "disk") == {"directory/new.txt": "new"}


def test_relative_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with atomic_directory(Path("../beside")) as temporary:
        (temporary / "file.txt").write_text("whole")
    assert list_tree(tmp_path) == {"beside/file.txt": "whole"}


def test_file_in_the_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    write_text(tmp_path / "notes.txt", "precious")
    with (
        pytest.raises(ValueError, match=r"free or a directory: got '.*notes.txt', a file"),
        atomic_directory(tmp_path / "notes.txt"),
    ):
        pass
    assert list_tree(tmp_path) == {"notes.txt": "precious"}


def test_permissions_are_those_of_any_new_file(tmp_path: Path, umask: int) -> None:
    write_text(tmp_path / "file.txt", "text")
    with atomic_directory(tmp_path / "directory"):
        pass
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((tmp_path / "directory").stat().st_mode) == 0o777 & ~umask
