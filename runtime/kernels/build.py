"""Compiles the CPU kernels into one shared library with a plain C interface.

The library depends neither on a version of Python nor on one of torch, so any C++17 compiler will do. It lies beside
its sources and carries their hash in its name: a library of other sources is never loaded. It is made when the
package is installed (``hatch_build.py``), or, in a source checkout, when a kernel is first wanted. Only the standard
library is imported here, because the build runs without the project's dependencies.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "cpu"
# Which instructions a function may use is written in the sources; none of the flags is about this machine.
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-Wno-maybe-uninitialized")
# Without OpenMP (some clang installations) the kernels run on one thread.
_ATTEMPTS = (("-fopenmp",), ())


class CompilationFailed(Exception):
    """No compiler was found, or it refused the sources, or the place cannot be written; the text says which."""


def library_path() -> Path:
    """Returns where the library of the present sources lies, whether or not it is there."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return SOURCES / f"bitplan_cpu_{digest.hexdigest()[:16]}.{'dll' if sys.platform == 'win32' else 'so'}"


def find_compiler() -> str | None:
    """Returns the command of a C++ compiler, or None."""
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def compile_library(target: Path) -> None:
    """Compiles the library; the file appears complete or not at all.

    Raises:
        CompilationFailed: If it cannot be made.
    """
    compiler = find_compiler()
    if compiler is None:
        msg = "no C++ compiler was found: looked for c++, g++, clang++. Install one (Debian: apt install g++)."
        raise CompilationFailed(msg)
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, suffix=".part")
    except OSError as error:
        msg = f"the library's directory must be writable: got '{target.parent}', {error.strerror}."
        raise CompilationFailed(msg) from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        _compile(compiler, temporary)
        temporary.chmod(0o755)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _compile(compiler: str, target: Path) -> None:
    sources = sorted(str(source) for source in SOURCES.glob("*.cpp"))
    for extra in _ATTEMPTS:
        command = [compiler, *FLAGS, *extra, *sources, "-o", str(target)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode == 0:
            return
    msg = f"'{compiler}' must accept the CPU kernels: it ended with {run.returncode}: {run.stderr.strip()[-2000:]}"
    raise CompilationFailed(msg)
