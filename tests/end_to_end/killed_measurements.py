"""Measurements killed at random moments, run in a process of its own.

``python -m tests.end_to_end.killed_measurements <kills> <seed> <directory> <arguments of measure>`` measures once
without a kill into ``<directory>/whole`` and then, killing again and again, into ``<directory>/killed-<n>``; it prints
how many measurements were killed and how many were finished. Every measurement is the command in a fork of this
process, which has everything imported: so the kills fall into the measuring and not into the imports.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from allocator.cli import run
from allocator.pipeline import measure  # noqa: F401 (imported before the forks)


def start_measuring(arguments: list[str], cache: Path, out: Path) -> int:
    """Returns the process that measures."""
    process = os.fork()
    if process == 0:
        os.environ["BITPLAN_CACHE"] = str(cache)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        os._exit(run(["measure", *arguments, "--out", str(out)]))
    return process


def wait_for(process: int) -> int:
    """Returns the exit code of a process, the negative signal where one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(kills: int, seed: int, directory: Path, arguments: list[str]) -> None:
    """Measures, kills, resumes, until enough were killed and the last one is finished."""
    started = time.monotonic()
    assert wait_for(start_measuring(arguments, directory / "whole-cache", directory / "whole")) == 0
    # So short that several kills fall into one measurement.
    longest_s = (time.monotonic() - started) / 3
    moments = random.Random(seed)
    killed = finished = 0
    while killed < kills:
        cache, out = directory / f"cache-{finished}", directory / f"killed-{finished}"
        process = start_measuring(arguments, cache, out)
        time.sleep(moments.uniform(0.0, longest_s))
        os.kill(process, signal.SIGKILL)
        code = wait_for(process)
        assert code in (0, -signal.SIGKILL), code
        killed += code != 0
        finished += code == 0
    cache, out = directory / f"cache-{finished}", directory / f"killed-{finished}"
    assert wait_for(start_measuring(arguments, cache, out)) == 0
    print(killed, finished + 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
