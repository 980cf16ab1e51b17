"""The command in a process of its own."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(*arguments: str | Path, cache: Path, most_file_bytes: int | None = None) -> "subprocess.Popen[str]":
    """Starts ``python -m allocator.cli ARGUMENTS`` with its own cache, and no file longer than a limit."""

    def prepare() -> None:
        # A shell starts what runs in its background with SIGINT ignored, and children inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if most_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_file_bytes, most_file_bytes))

    environment: Mapping[str, str] = {**os.environ, "BITPLAN_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "allocator.cli", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def list_files(directory: Path) -> list[str]:
    """Returns the files below a directory, hidden ones included."""
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
