"""The contract of the queue, on both databases: claimed by one, completed at most once, never lost."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Connection, select, update

from allocator.service.database import Database, now_s
from allocator.service.job_queue import Claim, JobLost, JobQueue, JobRequest
from allocator.service.records import Records, add_artefact
from allocator.service.schema import artefacts, attempts, jobs

MODEL = "0" * 32


@pytest.fixture
def queue(database: Database) -> JobQueue:
    Records(database).add_model(MODEL, name="tiny", path="/models/tiny", facts={"bytes": 1})
    return JobQueue(database, lease_s=30.0, most_attempts=3)


def submit(queue: JobQueue, fingerprint: str = "aa" * 32) -> str:
    request = JobRequest(
        kind="measure", model_id=MODEL, plan_id=None, options={"seed": 1, "calibration": None}, fingerprint=fingerprint
    )
    return queue.submit(request)[0]


def take(queue: JobQueue, worker: str = "w") -> Claim:
    claim = queue.claim(worker)
    assert claim is not None
    return claim


def expire(queue: JobQueue, job_id: str) -> None:
    """Lets the lease of a job end, as if its worker had been killed a while ago."""
    with queue.database.writing() as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(lease_until=now_s() - 1.0))


def row_of(queue: JobQueue, job_id: str) -> Any:
    with queue.database.reading() as connection:
        return connection.execute(select(jobs).where(jobs.c.id == job_id)).one()


def outcomes_of(queue: JobQueue, job_id: str) -> list[str | None]:
    query = select(attempts.c.outcome).where(attempts.c.job_id == job_id).order_by(attempts.c.fence)
    with queue.database.reading() as connection:
        return list(connection.execute(query).scalars())


def test_a_job_goes_from_waiting_to_its_result(queue: JobQueue) -> None:
    job_id = submit(queue)
    claim = take(queue)
    assert (claim.job_id, claim.fence, claim.options) == (job_id, 1, {"seed": 1, "calibration": None})
    assert queue.claim("other") is None
    queue.report(claim, {"stage": "fisher", "done": 1, "total": 2, "unit": "steps"})
    queue.succeed(claim, {"profile_id": "p"})
    row = row_of(queue, job_id)
    assert (row.state, row.result, row.attempts) == ("succeeded", '{"profile_id": "p"}', 1)
    assert row.created_at <= row.started_at <= row.finished_at
    assert outcomes_of(queue, job_id) == ["succeeded"]


def test_jobs_are_taken_in_the_order_they_came(queue: JobQueue) -> None:
    submitted = [submit(queue, f"{i:064x}") for i in range(5)]
    assert [take(queue).job_id for _ in submitted] == submitted


def test_equal_requests_share_a_job_until_it_failed(queue: JobQueue) -> None:
    first = submit(queue)
    assert submit(queue) == first
    claim = take(queue)
    assert submit(queue) == first
    queue.fail(claim, {"title": "no"})
    second = submit(queue)
    assert second != first
    queue.succeed(take(queue), {})
    assert submit(queue) == second


def test_equal_requests_at_the_same_time_share_a_job(queue: JobQueue) -> None:
    found = run_together(lambda: submit(queue), 8)
    assert len(set(found)) == 1


def test_a_job_is_claimed_by_one_of_many(queue: JobQueue) -> None:
    submitted = {submit(queue, f"{i:064x}") for i in range(6)}
    claims = [claim for claim in run_together(lambda: queue.claim("w"), 12) if claim is not None]
    assert sorted(claim.job_id for claim in claims) == sorted(submitted)


def test_a_lost_worker_is_replaced_and_can_change_nothing_more(queue: JobQueue) -> None:
    job_id = submit(queue)
    lost = take(queue, "lost")
    expire(queue, job_id)
    other = take(queue, "other")
    assert (other.job_id, other.fence) == (job_id, lost.fence + 1)
    for change in (
        lambda: queue.renew(lost),
        lambda: queue.report(lost, {}),
        lambda: queue.succeed(lost, {"profile_id": "wrong"}),
        lambda: queue.fail(lost, {}),
        lambda: queue.release(lost),
    ):
        with pytest.raises(JobLost, match="a job must be the worker's own to be changed"):
            change()
    queue.succeed(other, {"profile_id": "right"})
    assert row_of(queue, job_id).result == '{"profile_id": "right"}'
    assert outcomes_of(queue, job_id) == ["worker lost", "succeeded"]


def test_a_worker_whose_lease_ended_unnoticed_may_still_end_the_job(queue: JobQueue) -> None:
    job_id = submit(queue)
    claim = take(queue)
    expire(queue, job_id)
    queue.succeed(claim, {})
    assert queue.claim("other") is None
    assert row_of(queue, job_id).state == "succeeded"


def test_a_renewed_lease_is_no_expired_one(queue: JobQueue) -> None:
    job_id = submit(queue)
    claim = take(queue)
    expire(queue, job_id)
    queue.renew(claim)
    assert queue.claim("other") is None


def test_of_two_that_end_a_job_at_once_one_does(queue: JobQueue) -> None:
    job_id = submit(queue)
    lost = take(queue)
    expire(queue, job_id)
    other = take(queue)
    ended = run_together(lambda claim: end(queue, claim), [lost, other] * 4)
    # The winner's repeated ends are confirmations of the first.
    assert ended == ["lost", "ended"] * 4
    assert outcomes_of(queue, job_id).count("succeeded") == 1


def test_the_rows_of_a_result_are_written_with_it_or_not_at_all(queue: JobQueue) -> None:
    job_id = submit(queue)
    lost = take(queue)
    expire(queue, job_id)
    other = take(queue)

    def record(fence: int) -> Callable[[Connection], None]:
        row = {"id": f"{job_id}-{fence}", "kind": "export", "job_id": job_id, "model_id": MODEL, "facts": "{}"}
        return lambda connection: add_artefact(connection, **row)

    with pytest.raises(JobLost):
        queue.succeed(lost, {}, record(1))
    queue.succeed(other, {}, record(2))
    # An end that was not confirmed is tried again, and is no second one.
    queue.succeed(other, {}, record(2))
    with queue.database.reading() as connection:
        assert list(connection.execute(select(artefacts.c.id)).scalars()) == [f"{job_id}-2"]


def test_a_result_whose_rows_cannot_be_written_is_none(queue: JobQueue) -> None:
    job_id = submit(queue)
    claim = take(queue)

    def fail(_: Connection) -> None:
        msg = "no room"
        raise OSError(msg)

    with pytest.raises(OSError, match="no room"):
        queue.succeed(claim, {}, fail)
    assert row_of(queue, job_id).state == "running"
    assert outcomes_of(queue, job_id) == [None]


def test_a_job_that_takes_its_workers_down_fails_in_the_end(queue: JobQueue) -> None:
    job_id = submit(queue)
    for _ in range(3):
        take(queue)
        expire(queue, job_id)
    assert queue.claim("w") is None
    row = row_of(queue, job_id)
    assert row.state == "failed"
    assert "a worker must survive its job: 3 were lost" in row.error
    assert outcomes_of(queue, job_id) == ["worker lost"] * 3


def test_a_released_job_waits_again_and_is_no_failed_attempt(queue: JobQueue) -> None:
    job_id = submit(queue)
    for _ in range(5):
        queue.release(take(queue))
    assert (row_of(queue, job_id).state, row_of(queue, job_id).attempts) == ("queued", 0)
    assert take(queue).fence == 6


def test_a_cancelled_job_is_over_at_once(queue: JobQueue) -> None:
    waiting, running = submit(queue, "bb" * 32), None
    assert queue.cancel(waiting)
    running = submit(queue)
    claim = take(queue)
    assert claim.job_id == running
    assert queue.cancel(running)
    assert not queue.cancel(running)
    with pytest.raises(JobLost):
        queue.report(claim, {})
    assert (row_of(queue, waiting).state, row_of(queue, running).state) == ("cancelled", "cancelled")
    assert outcomes_of(queue, running) == ["cancelled"]
    assert submit(queue) != running


def test_every_change_that_is_watched_has_a_version(queue: JobQueue) -> None:
    job_id = submit(queue)
    versions = [row_of(queue, job_id).version]
    claim = take(queue)
    versions.append(row_of(queue, job_id).version)
    queue.report(claim, {"stage": "fisher"})
    versions.append(row_of(queue, job_id).version)
    queue.renew(claim)
    assert row_of(queue, job_id).version == versions[-1]
    queue.succeed(claim, {})
    versions.append(row_of(queue, job_id).version)
    assert versions == [1, 2, 3, 4]


def end(queue: JobQueue, claim: Claim) -> str:
    try:
        queue.succeed(claim, {"fence": claim.fence})
    except JobLost:
        return "lost"
    return "ended"


def run_together(function: Callable[..., Any], arguments: int | list[Any]) -> list[Any]:
    """Returns what a function returns in threads that start at the same moment."""
    calls = [()] * arguments if isinstance(arguments, int) else [(argument,) for argument in arguments]
    found: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def call(index: int) -> None:
        barrier.wait()
        found[index] = function(*calls[index])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
