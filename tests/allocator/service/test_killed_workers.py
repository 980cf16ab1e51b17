"""Fifty workers killed at random moments: no job lost, none done twice, every directory whole or absent."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import select

from allocator.service.database import Database
from allocator.service.schema import SUCCEEDED, artefacts, attempts, jobs

KILLS = 50


@pytest.mark.parametrize("seed", [0, 1])
def test_what_killed_workers_leave(database: Database, tmp_path: Path, seed: int) -> None:
    place = tmp_path / "work"
    (place / "artefacts").mkdir(parents=True)
    arguments = [database.url, str(place), str(KILLS), str(seed)]
    command = [sys.executable, "-m", "tests.allocator.service.killed_workers", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    submitted = done.stdout.split()
    assert len(set(submitted)) == 4 * KILLS and len(submitted) == 8 * KILLS
    with database.reading() as connection:
        states = {row.id: row.state for row in connection.execute(select(jobs.c.id, jobs.c.state))}
        outcomes = connection.execute(select(attempts.c.job_id, attempts.c.outcome)).all()
        made = {row.id: row.job_id for row in connection.execute(select(artefacts.c.id, artefacts.c.job_id))}
    assert states == dict.fromkeys(submitted, SUCCEEDED)
    assert Counter(row.job_id for row in outcomes if row.outcome == SUCCEEDED) == Counter(states.keys())
    # Otherwise no kill fell into any work, and nothing was shown.
    assert sum(row.outcome == "worker lost" for row in outcomes) > 0
    assert sorted(made.values()) == sorted(states)
    for artefact_id, job_id in made.items():
        texts = {path.name: path.read_text() for path in (place / "artefacts" / artefact_id).iterdir()}
        assert texts == dict.fromkeys(("first", "second"), job_id * 1000)
