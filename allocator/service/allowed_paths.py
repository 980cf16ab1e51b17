"""Paths from requests: only what really lies below the allowed directories, links followed to their ends."""

from collections.abc import Sequence
from pathlib import Path


class ForbiddenPath(Exception):
    """A path is not below any allowed directory."""


def resolve_below(text: str, roots: Sequence[Path]) -> Path:
    """Returns the real path of a file or directory below one of the roots.

    What is outside and what is not there are answered alike, so that nobody learns what exists elsewhere.

    Args:
        text: The path as it was sent; relative ones are looked for below each root.
        roots: Allowed directories.

    Raises:
        ForbiddenPath: If it is not below them, or there is none.
    """
    if "\0" not in text and text.strip():
        for root in roots:
            real_root = root.resolve()
            found = _resolve(real_root / text)
            if found is not None and found.is_relative_to(real_root) and found != real_root:
                return found
    msg = (
        f"a path must name something below the directories that the server was given (--model-root): got "
        f"'{text[:200]}'. Place it there, or start the server with its directory."
    )
    raise ForbiddenPath(msg)


def check_contents(directory: Path, roots: Sequence[Path]) -> None:
    """Checks that no link in a directory leads out of the roots.

    Hugging Face's own cache keeps its files behind such links, inside of its directory.

    Raises:
        ForbiddenPath: If one does.
    """
    real_roots = [root.resolve() for root in roots]
    for path in directory.rglob("*"):
        if path.is_symlink():
            found = _resolve(path)
            if found is None or not any(found.is_relative_to(root) for root in real_roots):
                msg = (
                    f"links in a model's directory must end below the allowed directories: got '{path.name}' in "
                    f"'{directory.name}', which does not. Copy the file to its place."
                )
                raise ForbiddenPath(msg)


def _resolve(path: Path) -> Path | None:
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        return None
