"""Results do not depend on the number of threads."""

import json
import os
import subprocess
import sys
from pathlib import Path

from solvers import SOLVERS

ROOT = Path(__file__).parents[2]
VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def run_with_threads(n_threads: int) -> dict[str, list[object]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **dict.fromkeys(VARIABLES, str(n_threads))}
    command = [sys.executable, "-m", "tests.solvers.print_results"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, list[object]] = json.loads(done.stdout)
    return results


def test_every_solver_gives_the_same_on_one_and_two_threads() -> None:
    one, two = run_with_threads(1), run_with_threads(2)
    assert {name.partition(",")[0] for name in one} == {*SOLVERS, "frontier"}
    assert {name: (result, two[name]) for name, result in one.items() if two[name] != result} == {}
