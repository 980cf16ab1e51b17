"""The service as people start it: a process of ``bitplan serve`` on a free port."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2

# Longer than a busy machine takes to import what a server needs.
_START_S = 600.0


def free_port() -> int:
    """Returns a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment_of(cache: Path) -> dict[str, str]:
    """Returns the environment of a process whose store is a directory."""
    return {**os.environ, "BITPLAN_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


@contextmanager
def serve(cache: Path, model_roots: Sequence[Path], options: Sequence[str] = ()) -> Iterator[str]:
    """Gives the address of a service that runs until the body ends."""
    port = free_port()
    roots = [part for root in model_roots for part in ("--model-root", str(root))]
    command = [sys.executable, "-m", "allocator.cli", "serve", "--port", str(port), *roots, *options]
    log = cache.parent / f"serve-{port}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=environment_of(cache), stdout=stream, stderr=stream)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        assert process.poll() is None and time.monotonic() < deadline, f"the server must start:\n{log.read_text()}"
        try:
            if httpx2.get(f"{url}/healthz", timeout=5.0).is_success:
                return
        except httpx2.TransportError:
            time.sleep(0.1)
