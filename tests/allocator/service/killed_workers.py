"""Workers of the queue killed at random moments, run in a process of its own.

``python -m tests.allocator.service.killed_workers <url> <directory> <kills> <seed>`` starts workers as forks of this
process, which has everything imported, kills them again and again, submits jobs meanwhile, and lets the last finish. A
job writes a directory of two files, as an export does, and ends. It prints the ids of all jobs that were submitted.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from allocator.service.database import Database
from allocator.service.job_queue import JobLost, JobQueue, JobRequest
from allocator.service.records import Records, add_artefact
from runtime.files import atomic_directory

MODEL = "0" * 32
WORKERS = 3
LEASE_S = 0.3
_WORK_S = 0.02  # of the order of the time between kills, so that they fall into work
_LONGEST_S = 0.15


def work(url: str, directory: Path) -> None:
    """Takes jobs until it is killed, or there is none and a file says that it is time to go."""
    queue = JobQueue(Database(url), lease_s=LEASE_S, most_attempts=1000)
    while True:
        claim = queue.claim(str(os.getpid()))
        if claim is None:
            if (directory / "over").exists():
                return
            time.sleep(0.01)
            continue
        artefact_id = f"{claim.job_id}-{claim.fence}"
        row = {
            "id": artefact_id,
            "kind": "export",
            "job_id": claim.job_id,
            "model_id": MODEL,
            "facts": json.dumps({"files": ["first", "second"]}),
        }
        try:
            queue.report(claim, {"stage": "export", "done": 0, "total": 1, "unit": "models"})
            with atomic_directory(directory / "artefacts" / artefact_id) as place:
                (place / "first").write_text(claim.job_id * 1000)
                time.sleep(_WORK_S)
                (place / "second").write_text(claim.job_id * 1000)
            queue.succeed(
                claim, {"export_id": artefact_id}, lambda connection, row=row: add_artefact(connection, **row)
            )
        except JobLost:
            continue


def start(url: str, directory: Path) -> int:
    """Returns a new worker's process."""
    process = os.fork()
    if process == 0:
        work(url, directory)
        os._exit(0)
    return process


def main(url: str, directory: Path, kills: int, seed: int) -> None:
    """Submits and kills, and prints what was submitted."""
    moments = random.Random(seed)
    workers = [start(url, directory) for _ in range(WORKERS)]
    queue = JobQueue(Database(url), lease_s=LEASE_S, most_attempts=1000)
    Records(queue.database).add_model(MODEL, name="m", path="/m", facts={})
    submitted = []
    for kill in range(kills):
        for part in range(4):
            fingerprint = f"{kill:032x}{part:032x}"
            request = JobRequest(kind="export", model_id=MODEL, plan_id=None, options={}, fingerprint=fingerprint)
            # Each is asked for twice, and is one.
            submitted += [queue.submit(request)[0] for _ in range(2)]
        time.sleep(moments.uniform(0.0, _LONGEST_S))
        victim = workers.pop(moments.randrange(len(workers)))
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        queue.database.close()
        workers.append(start(url, directory))
    (directory / "over").touch()
    # A job whose worker was killed last is free when its lease ends; whoever left before does not see it.
    time.sleep(2 * LEASE_S)
    workers.append(start(url, directory))
    for worker in workers:
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
    sys.stdout.write("\n".join(submitted))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
