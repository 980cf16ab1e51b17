"""A service under load whose server and workers are killed at random moments, and what must hold afterwards.

``python -m tests.allocator.service.faults`` is the server that is killed; its settings are in the environment.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
from sqlalchemy import Row, select

from allocator.service.database import Database
from allocator.service.logs import start_logging
from allocator.service.schema import SUCCEEDED, artefacts, attempts, jobs, profiles
from allocator.service.settings import SETTINGS_VARIABLE, ServiceSettings, settings_from_json
from allocator.store import Store
from runtime.packed_model import load_packed
from tests.tiny_measurements import CONFIG, FORMATS

_TRANSIENT = (httpx2.TransportError,)


@dataclass
class Tally:
    """What happened: kills by what was killed, and jobs that the service had acknowledged."""

    kills: Counter[str] = field(default_factory=Counter)
    acknowledged: set[str] = field(default_factory=set)


class TormentedService:
    """A server process that is killed and started again.

    Args:
        settings: Its settings, with a port.
        log: File that its logs go to.
    """

    def __init__(self, settings: ServiceSettings, log: Path) -> None:
        self.settings = settings
        self.log = log
        self.client = httpx2.Client(base_url=f"http://127.0.0.1:{settings.port}", timeout=10.0)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the server."""
        environment = {**os.environ, SETTINGS_VARIABLE: self.settings.to_json(), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.allocator.service.faults"]
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(command, env=environment, stderr=stream, stdout=stream)

    def kill(self, moments: random.Random) -> str:
        """Kills the server or one of its workers; returns which."""
        assert self.process is not None
        workers = [child for child in psutil.Process(self.process.pid).children() if child.is_running()]
        if workers and moments.random() < 0.7:
            moments.choice(workers).kill()
            return "worker"
        self.process.kill()
        self.process.wait()
        self.start()
        return "server"

    def stop(self) -> None:
        """Ends the server as an operator does."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait(60)

    def send(self, method: str, path: str, body: Any = None, *, key: str | None = None) -> dict[str, Any]:
        """Returns the answer to a request, sent again until there is one."""
        headers = {} if key is None else {"Idempotency-Key": key}
        while True:
            try:
                answer = self.client.request(method, path, json=body, headers=headers)
            except _TRANSIENT:
                time.sleep(0.1)
                continue
            # 409: the first request with this key died with its server, and its place is not free yet.
            if answer.status_code not in (409, 503):
                assert answer.status_code < 300, answer.text
                found: dict[str, Any] = answer.json()
                return found
            time.sleep(0.1)


class Load:
    """Keeps a number of jobs in the queue: measurements, and what can be made of their plans.

    Args:
        service: The service.
        waiting: Jobs that are kept unfinished.
        tally: What is counted.
    """

    def __init__(self, service: TormentedService, waiting: int, tally: Tally) -> None:
        self.service = service
        self.waiting = waiting
        self.tally = tally
        self.model_id = service.send("POST", "/models", {"path": "tiny"})["id"]
        self._seed = 0
        self._planned: set[str] = set()

    def top_up(self) -> None:
        """Submits jobs until enough are unfinished."""
        unfinished = sum(
            len(self.service.send("GET", f"/jobs?state={state}&limit=200")["items"]) for state in ("queued", "running")
        )
        for profile in self.service.send("GET", "/profiles?limit=200")["items"]:
            if profile["id"] not in self._planned:
                self._planned.add(profile["id"])
                self._use(profile["id"])
        for _ in range(self.waiting - unfinished):
            self._seed += 1
            options = {"calibration": "calibration.txt", "formats": list(FORMATS), **asdict(CONFIG), "seed": self._seed}
            self._submit({"kind": "measure", "model_id": self.model_id, "options": options})

    def _use(self, profile_id: str) -> None:
        body = {"profile_id": profile_id, "budget": {"bits_per_weight": 8.6}}
        plan = self.service.send("POST", "/plans", body)
        for kind in ("apply", "evaluate"):
            self._submit({"kind": kind, "plan_id": plan["id"]})

    def _submit(self, body: dict[str, Any]) -> None:
        key = f"{body['kind']}-{self._seed}-{len(self.tally.acknowledged)}"
        self.tally.acknowledged.add(self.service.send("POST", "/jobs", body, key=key)["id"])


def torment(service: TormentedService, *, kills: int, seed: int, longest_s: float, waiting: int) -> Tally:
    """Kills a service again and again under load, and then lets it finish; returns what happened."""
    tally, moments = Tally(), random.Random(seed)
    service.start()
    load = Load(service, waiting, tally)
    while sum(tally.kills.values()) < kills:
        load.top_up()
        time.sleep(moments.uniform(0.0, longest_s))
        tally.kills[service.kill(moments)] += 1
    while any(service.send("GET", f"/jobs?state={state}")["items"] for state in ("queued", "running")):
        time.sleep(0.2)
    service.stop()
    return tally


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a tormented service has in the end; what must not be is counted too, and must be 0.

    Args:
        jobs: Jobs in the queue.
        attempts: Times that a worker took one.
        profiles: Profiles that are known.
        artefacts: Directories of files that are known.
        lost: Jobs that were acknowledged and are not there, or did not succeed.
        twice: Jobs that more than one attempt ended, or requests that have more than one job.
        partial: Directories that are not those which jobs recorded, files of other lengths than recorded, and profiles
            that cannot be read.
    """

    jobs: int
    attempts: int
    profiles: int
    artefacts: int
    lost: int
    twice: int
    partial: int


def find_outcome(settings: ServiceSettings, tally: Tally) -> Outcome:
    """Returns what a service that was killed and has finished has in its database, its store and its directory."""
    database = Database(settings.url)
    with database.reading() as connection:
        rows = connection.execute(select(jobs)).all()
        tries = connection.execute(select(attempts)).all()
        made = connection.execute(select(artefacts)).all()
        known = connection.execute(select(profiles.c.id)).scalars().all()
    database.close()
    done = {row.id for row in rows if row.state == SUCCEEDED}
    ends = Counter(attempt.job_id for attempt in tries if attempt.outcome == SUCCEEDED)
    requests = Counter(row.fingerprint for row in rows)
    return Outcome(
        jobs=len(rows),
        attempts=len(tries),
        profiles=len(known),
        artefacts=len(made),
        lost=len((tally.acknowledged | {row.id for row in rows}) - (done & set(ends))),
        twice=sum(count > 1 for count in ends.values()) + sum(count > 1 for count in requests.values()),
        partial=_count_partial(settings, made, known),
    )


def _count_partial(settings: ServiceSettings, made: Sequence[Row[Any]], known: Sequence[str]) -> int:
    place, store = settings.directory / "artefacts", Store(settings.store_root)
    found = {path.name for path in place.iterdir()} if place.is_dir() else set()
    wrong = found ^ {row.id for row in made}
    for row in made:
        lengths = {place / row.id / file["name"]: file["bytes"] for file in json.loads(row.facts)["files"]}
        if any(not path.is_file() or path.stat().st_size != length for path, length in lengths.items()):
            wrong.add(row.id)
        elif row.kind == "export":
            load_packed(place / row.id)
    return len(wrong) + sum(store.find_profile(profile_id) is None for profile_id in known)


if __name__ == "__main__":
    from allocator.service.serving import serve

    start_logging()
    serve(settings_from_json(os.environ[SETTINGS_VARIABLE]))
