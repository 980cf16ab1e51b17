"""A database that is gone, or full: clear answers of 503, work that is kept, and recovery without a restart."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from allocator.service.settings import ServiceSettings
from allocator.service.worker import Worker
from sensitivity.profile import SensitivityProfile
from tests.allocator.service.running_service import RunningService, run_in_thread
from tests.allocator.service.test_database import limit_pages
from tests.allocator.service.test_jobs_by_http import MEASURE
from tests.postgres_cluster import PostgresCluster

QUESTIONS = ("/models", "/jobs", "/plans", "/profiles", "/readyz", "/metrics", "/plans/0", "/jobs/0/events")


@pytest.fixture
def on_postgres(service_settings: ServiceSettings, postgres: PostgresCluster) -> Iterator[RunningService]:
    """A running service on a database of its own in PostgreSQL."""
    with run_in_thread(dataclasses.replace(service_settings, database_url=postgres.make_database())) as running:
        yield running


def check_unavailable(answer: Any) -> None:
    assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
    assert answer.json()["detail"].startswith("the database must be reachable and able to write")
    assert int(answer.headers["retry-after"]) > 0


def test_a_server_whose_database_is_gone_says_so_and_recovers(
    on_postgres: RunningService, postgres: PostgresCluster, tiny_profile: SensitivityProfile
) -> None:
    profile_id = on_postgres.add_profile(tiny_profile.fingerprint)
    question = {"profile_id": profile_id, "budget": {"bits_per_weight": 5}}
    before = on_postgres.post("/plans", question).json()
    postgres.stop()
    try:
        for path in QUESTIONS:
            check_unavailable(on_postgres.get(path))
        check_unavailable(on_postgres.post("/plans", question))
        check_unavailable(on_postgres.post("/plans", question, headers={"Idempotency-Key": "k"}))
        assert on_postgres.get("/healthz").status_code == 200
    finally:
        postgres.start()
    assert on_postgres.get("/readyz").status_code == 200
    assert on_postgres.post("/plans", question, headers={"Idempotency-Key": "k"}).json() == before


def test_a_worker_whose_database_is_gone_ends_its_job_when_it_is_back(
    service_settings: ServiceSettings, postgres: PostgresCluster, tmp_path: Path
) -> None:
    url = postgres.make_database()
    settings = dataclasses.replace(service_settings, database_url=url, store_root=tmp_path, lease_s=0.8)
    with run_in_thread(settings) as running:
        body = {"kind": "measure", "model_id": running.add_model(), "options": MEASURE}
        job_id = running.post("/jobs", body).json()["id"]
        worker = threading.Thread(target=Worker(settings).run_once)
        worker.start()
        wait_until(lambda: running.get(f"/jobs/{job_id}").json()["progress"]["stage"] == "fisher")
        postgres.stop()
        # Longer than the lease.
        time.sleep(1.5)
        postgres.start()
        worker.join()
        job = running.get(f"/jobs/{job_id}").json()
        assert (job["state"], job["attempts"]) == ("succeeded", 1)


def test_a_server_whose_disk_is_full_says_so_and_recovers(
    service_settings: ServiceSettings, tiny_profile: SensitivityProfile, tmp_path: Path
) -> None:
    settings = dataclasses.replace(service_settings, database_url=f"sqlite:///{tmp_path / 'small.sqlite3'}")
    with run_in_thread(settings) as running:
        profile_id = running.add_profile(tiny_profile.fingerprint)
        answers = []
        fill(running)
        for i in range(60):
            question = {"profile_id": profile_id, "budget": {"bits_per_weight": 5 + i / 100}}
            answers.append(running.post("/plans", question))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert refused
        for answer in refused:
            check_unavailable(answer)
        # What is there can still be read.
        assert running.get("/models").status_code == 200
        limit_pages(running.service.database, 100_000)
        for i in range(60):
            question = {"profile_id": profile_id, "budget": {"bits_per_weight": 5 + i / 100}}
            assert running.post("/plans", question).status_code == 200
        assert len(running.get("/plans?limit=200").json()["items"]) == 60


# What a server of PostgreSQL says whose disk is full, said by the server itself.
FULL_DISK = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full';
END $$;
CREATE TRIGGER full_disk BEFORE INSERT ON plans EXECUTE FUNCTION refuse();
"""


def test_a_server_whose_database_has_a_full_disk_says_so_and_recovers(
    on_postgres: RunningService, tiny_profile: SensitivityProfile
) -> None:
    profile_id = on_postgres.add_profile(tiny_profile.fingerprint)
    question = {"profile_id": profile_id, "budget": {"bits_per_weight": 5}}
    with on_postgres.service.database.writing() as connection:
        connection.exec_driver_sql(FULL_DISK)
    check_unavailable(on_postgres.post("/plans", question))
    assert on_postgres.get("/models").status_code == 200
    with on_postgres.service.database.writing() as connection:
        connection.exec_driver_sql("DROP TRIGGER full_disk ON plans")
    assert on_postgres.post("/plans", question).status_code == 200


def fill(running: RunningService) -> None:
    """Leaves the database as many pages as it has."""
    with running.service.database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    limit_pages(running.service.database, pages)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 120.0
    while not condition():
        assert time.monotonic() < deadline, "it must happen within two minutes"
        time.sleep(0.02)
