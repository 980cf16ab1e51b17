"""Writing files and directories so that they are there whole or not at all.

Everything is written under a temporary name beside its target and renamed when complete; what a failure or an
interrupt leaves is only the temporary name, which is removed on the way out. Replacing a directory takes two
renames; a process killed between them leaves the old one beside its place, under a name that ends in ``.old``.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` to write to; renames it to ``path`` if the body succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        with _naming(path):
            yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Gives a temporary directory beside ``path`` to fill; it becomes ``path`` if the body succeeds.

    A directory that is already at ``path`` is replaced as a whole, after the new one is complete.

    Raises:
        ValueError: If a file is at ``path``.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        msg = f"the place of a directory must be free or a directory: got '{path}', a file. Use another path."
        raise ValueError(msg)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        with _naming(path):
            yield temporary
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
            path.rename(retired / path.name)
            temporary.rename(path)
            shutil.rmtree(retired)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_replaceable(directory: Path, *, is_own: Callable[[Path], bool], content: str) -> None:
    """Checks that a directory may be replaced as a whole: it is not there, is empty, or holds the same kind of thing.

    Args:
        directory: The directory.
        is_own: Tells whether a directory that is not empty holds such a thing and may go.
        content: What it is to hold, with its article.

    Raises:
        ValueError: If something else is there.
    """
    if not directory.exists() and not directory.is_symlink():
        return
    names = sorted(p.name for p in directory.iterdir()) if directory.is_dir() else None
    if names == [] or (names and is_own(directory)):
        return
    found = f"a directory with {', '.join(names[:5])}" if names else "a file"
    msg = (
        f"the place of {content} is replaced as a whole, so it must be free, empty, or hold {content} already: got "
        f"'{directory}', {found}. Use another directory."
    )
    raise ValueError(msg)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Makes a failure of the system name the path that was written."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        # Writers made in Rust (safetensors, tokenizers) give the system's error in their text alone.
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
