"""A PostgreSQL cluster of its own for tests and benchmarks: made in a directory, reached through a socket in it."""

import os
import shutil
import subprocess
from pathlib import Path

_BINARIES = Path("/usr/lib/postgresql")
USER = "bitplan"


class PostgresCluster:
    """A cluster in a directory; databases are made in it one for each test.

    Args:
        directory: An empty directory that its server may own.
        binaries: Directory of ``initdb`` and ``pg_ctl``.
    """

    def __init__(self, directory: Path, binaries: Path) -> None:
        self.directory = directory
        self.binaries = binaries
        self._databases = 0
        # The server refuses to run as root.
        self._as_user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        if self._as_user:
            shutil.chown(directory, "postgres", "postgres")
        self._run("initdb", "-D", str(directory / "data"), "-A", "trust", "-U", USER, "-E", "UTF8", "--no-sync")

    def start(self) -> None:
        """Starts the server, and waits until it answers."""
        options = f"-k {self.directory} -c listen_addresses='' -c fsync=off -c max_connections=200"
        log = str(self.directory / "log")
        self._run("pg_ctl", "-D", str(self.directory / "data"), "-o", options, "-l", log, "-w", "start")

    def stop(self) -> None:
        """Stops the server at once, connections or not."""
        self._run("pg_ctl", "-D", str(self.directory / "data"), "-m", "immediate", "-w", "stop")

    def make_database(self) -> str:
        """Returns the URL of a new, empty database."""
        self._databases += 1
        name = f"bitplan{self._databases}"
        self._run("createdb", "-h", str(self.directory), "-U", USER, name)
        return f"postgresql://{USER}@/{name}?host={self.directory}"

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as_user, str(self.binaries / program), *arguments]
        # A server keeps what it inherits open, and a pipe would never end.
        silence = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        done = subprocess.run(command, cwd="/", check=False, **silence)
        assert done.returncode == 0, f"{program} failed; see {self.directory / 'log'}"


def find_postgres() -> Path | None:
    """Returns the directory of PostgreSQL's programs, or None where it is not installed."""
    installed = sorted(_BINARIES.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if installed:
        return installed[-1].parent
    found = shutil.which("initdb")
    return None if found is None else Path(found).parent
