"""The service under load while its processes are killed: 50 times on each database. Writes service_faults.md.

Server or worker (7 of 10 times) is killed with SIGKILL at random moments, up to ten seconds apart, while measurements
of a tiny model, evaluations and packed models are in the queue; the server is started again by hand, workers by the
server. In the end everything that was acknowledged must have been done once, and every directory of files be whole.
"""

import shutil
import socket
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from machine import describe_machine

sys.path.insert(0, str(Path(__file__).parent.parent))

from allocator.service.settings import ServiceSettings
from tests.allocator.service.faults import TormentedService, find_outcome, torment
from tests.postgres_cluster import PostgresCluster, find_postgres
from tests.tiny_models import build_tiny_llama, sample_text, save_model

KILLS = 50
LONGEST_S = 10.0
COLUMNS = (
    *("database", "kills of workers", "of the server", "jobs", "attempts", "profiles", "packed models"),
    *("jobs lost", "done twice", "artefacts partial", "minutes"),
)


def main() -> None:
    directory = Path(tempfile.mkdtemp(prefix="bitplan-faults-"))
    models = directory / "models"
    models.mkdir()
    save_model(build_tiny_llama(), models / "tiny")
    (models / "calibration.txt").write_text(sample_text(12_000), encoding="utf-8")
    binaries = find_postgres()
    assert binaries is not None, "PostgreSQL must be installed"
    # Where the user that runs it may go.
    place = Path(tempfile.mkdtemp(prefix="bitplan-pg-", dir="/tmp"))
    cluster = PostgresCluster(place, binaries)
    cluster.start()
    urls = {"SQLite": None, "PostgreSQL": cluster.make_database()}
    rows = [run(name, url, directory) for name, url in urls.items()]
    cluster.stop()
    shutil.rmtree(place)
    shutil.rmtree(directory)
    lines = [
        "# Faults of the service",
        "",
        f"Made by `python benchmarks/bench_service_faults.py`. Machine: {describe_machine(('sqlalchemy', 'psycopg'))}.",
        f"{KILLS} kills on each database, two workers, leases of 3 s. At the end a job is lost that was acknowledged "
        "and is not there or did not succeed; done twice that two attempts ended, or whose request has two; an "
        "artefact is partial that no job recorded, lacks a file or bytes of one, or cannot be loaded.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *rows,
        "",
    ]
    text = "\n".join(lines)
    (Path(__file__).parent / "service_faults.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def run(name: str, url: str | None, directory: Path) -> str:
    """Returns the table's row of one database."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = ServiceSettings(
        store_root=directory / name,
        database_url=url,
        model_roots=(directory / "models",),
        port=port,
        workers=2,
        lease_s=3.0,
        most_attempts=2 * KILLS,
    )
    started = time.monotonic()
    service = TormentedService(settings, directory / f"{name}.log")
    tally = torment(service, kills=KILLS, seed=len(name), longest_s=LONGEST_S, waiting=4)
    found = find_outcome(settings, tally)
    minutes = (time.monotonic() - started) / 60
    cells = [name, tally.kills["worker"], tally.kills["server"], *asdict(found).values(), f"{minutes:.0f}"]
    sys.stderr.write(f"{cells}\n")
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
