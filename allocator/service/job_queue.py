"""The queue of jobs, in the database: claimed under a lease, completed at most once.

A worker claims the oldest job that waits, or that runs under a lease which has expired, and raises its fencing token
(`fence`). It renews the lease while it works. Every change it makes afterwards is conditional:

    UPDATE jobs SET … WHERE id = :id AND fence = :fence AND state = 'running'

so that of all workers that ever had a job at most one ends it, whatever their clocks and pauses; what belongs to the
end (rows of artefacts) is written in the same transaction. The claim is atomic by ``FOR UPDATE SKIP LOCKED`` on
PostgreSQL and by the one writer, ``BEGIN IMMEDIATE``, on SQLite.

A cancelled job is over at once; its worker finds out at its next change or heartbeat and stops.
"""

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, insert, or_, select, update

from allocator.service.database import Database, now_s
from allocator.service.schema import CANCELLED, FAILED, QUEUED, RUNNING, SUCCEEDED, attempts, jobs

NO_PROGRESS = {"stage": "waiting", "done": 0, "total": 0, "unit": "steps"}
WORKER_LOST = "worker lost"


class JobLost(Exception):
    """A job was cancelled or given to another worker: nothing more may be done for it."""


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What is asked of a worker.

    Args:
        kind: Name in ``JOB_KINDS``.
        model_id: The model.
        plan_id: The plan, where the kind needs one.
        options: JSON values, checked.
        fingerprint: Equal for requests that ask for the same.
    """

    kind: str
    model_id: str
    plan_id: str | None
    options: Mapping[str, Any]
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A job in the hands of a worker.

    Args:
        job_id: The job.
        fence: Its fencing token.
        kind: Name in ``JOB_KINDS``.
        model_id: The model.
        plan_id: The plan, or None.
        options: JSON values.
    """

    job_id: str
    fence: int
    kind: str
    model_id: str
    plan_id: str | None
    options: Mapping[str, Any]


class JobQueue:
    """The queue.

    Args:
        database: Where it is.
        lease_s: Seconds of a lease.
        most_attempts: Workers that one job may take down before it fails.
    """

    def __init__(self, database: Database, *, lease_s: float, most_attempts: int) -> None:
        self.database = database
        self.lease_s = lease_s
        self.most_attempts = most_attempts

    def submit(self, request: JobRequest) -> tuple[str, bool]:
        """Returns the id of a request's job, and whether it is new: one that waits, runs or succeeded is shared."""
        with self.database.writing() as connection:
            if not self.database.is_sqlite:
                # Two equal requests at once: the second waits here and finds the first one's row.
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_lock_number(request.fingerprint)})")
            known = connection.execute(
                select(jobs.c.id).where(
                    jobs.c.fingerprint == request.fingerprint, jobs.c.state.in_((QUEUED, RUNNING, SUCCEEDED))
                )
            ).scalar()
            if known is not None:
                return str(known), False
            job_id = secrets.token_hex(16)
            connection.execute(
                insert(jobs).values(
                    id=job_id,
                    kind=request.kind,
                    state=QUEUED,
                    fingerprint=request.fingerprint,
                    model_id=request.model_id,
                    plan_id=request.plan_id,
                    options=json.dumps(dict(request.options), sort_keys=True),
                    progress=json.dumps(NO_PROGRESS),
                    fence=0,
                    attempts=0,
                    version=1,
                    created_at=now_s(),
                )
            )
            return job_id, True

    def claim(self, worker: str) -> Claim | None:
        """Returns a job for a worker, or None where there is none to do."""
        with self.database.writing() as connection:
            while (row := self._next(connection)) is not None:
                if row.state == RUNNING:
                    _end_attempt(connection, row.id, row.fence, WORKER_LOST)
                if row.attempts < self.most_attempts:
                    return self._take(connection, row, worker)
                problem = _lost_problem(row.attempts)
                _change(connection, row.id, state=FAILED, error=json.dumps(problem), finished_at=now_s())
        return None

    def renew(self, claim: Claim) -> None:
        """Renews the lease of a claim.

        Raises:
            JobLost: If the job is no longer the worker's.
        """
        with self.database.writing() as connection:
            statement = update(jobs).where(_held(claim)).values(lease_until=now_s() + self.lease_s)
            _check(connection.execute(statement).rowcount, claim)

    def report(self, claim: Claim, progress: Mapping[str, Any]) -> None:
        """Writes how far a job is, and renews its lease.

        Raises:
            JobLost: If the job is no longer the worker's.
        """
        with self.database.writing() as connection:
            values = {"progress": json.dumps(dict(progress)), "lease_until": now_s() + self.lease_s}
            _check(_change_held(connection, claim, **values), claim)

    def succeed(
        self, claim: Claim, result: Mapping[str, Any], record: Callable[[Connection], None] | None = None
    ) -> None:
        """Ends a job with its result, once; when it is called again after an end that was not confirmed, it is content.

        Args:
            claim: The claim.
            result: JSON values.
            record: Writes what belongs to the result, in the same transaction.

        Raises:
            JobLost: If the job is no longer the worker's; nothing is written then.
        """
        with self.database.writing() as connection:
            values = {"state": SUCCEEDED, "result": json.dumps(dict(result)), "finished_at": now_s()}
            if _change_held(connection, claim, **values) != 1:
                _check_ended(connection, claim, SUCCEEDED)
                return
            if record is not None:
                record(connection)
            _end_attempt(connection, claim.job_id, claim.fence, SUCCEEDED)

    def fail(self, claim: Claim, problem: Mapping[str, Any]) -> None:
        """Ends a job with what went wrong.

        Raises:
            JobLost: If the job is no longer the worker's.
        """
        with self.database.writing() as connection:
            values = {"state": FAILED, "error": json.dumps(dict(problem)), "finished_at": now_s()}
            if _change_held(connection, claim, **values) != 1:
                _check_ended(connection, claim, FAILED)
                return
            _end_attempt(connection, claim.job_id, claim.fence, FAILED)

    def release(self, claim: Claim) -> None:
        """Gives a job back unfinished, as a worker does that is told to stop; this is no failed attempt.

        Raises:
            JobLost: If the job is no longer the worker's.
        """
        with self.database.writing() as connection:
            values = {"state": QUEUED, "attempts": jobs.c.attempts - 1, "worker": None, "lease_until": None}
            _check(_change_held(connection, claim, **values), claim)
            _end_attempt(connection, claim.job_id, claim.fence, "released")

    def cancel(self, job_id: str) -> bool:
        """Ends a job that waits or runs; returns whether it did."""
        with self.database.writing() as connection:
            condition = and_(jobs.c.id == job_id, jobs.c.state.in_((QUEUED, RUNNING)))
            values = {"state": CANCELLED, "finished_at": now_s(), "version": jobs.c.version + 1}
            changed = connection.execute(update(jobs).where(condition).values(values)).rowcount
            if changed:
                connection.execute(
                    update(attempts)
                    .where(attempts.c.job_id == job_id, attempts.c.ended_at.is_(None))
                    .values(ended_at=now_s(), outcome=CANCELLED)
                )
            return bool(changed)

    def _next(self, connection: Connection) -> Row[Any] | None:
        expired = and_(jobs.c.state == RUNNING, jobs.c.lease_until < now_s())
        query = select(jobs).where(or_(jobs.c.state == QUEUED, expired)).order_by(jobs.c.created_at, jobs.c.id).limit(1)
        return connection.execute(query.with_for_update(skip_locked=True)).first()

    def _take(self, connection: Connection, row: Row[Any], worker: str) -> Claim:
        fence = row.fence + 1
        _change(
            connection,
            row.id,
            state=RUNNING,
            fence=fence,
            attempts=row.attempts + 1,
            worker=worker,
            lease_until=now_s() + self.lease_s,
            started_at=now_s() if row.started_at is None else row.started_at,
        )
        connection.execute(insert(attempts).values(job_id=row.id, fence=fence, worker=worker, started_at=now_s()))
        return Claim(
            job_id=row.id,
            fence=fence,
            kind=row.kind,
            model_id=row.model_id,
            plan_id=row.plan_id,
            options=json.loads(row.options),
        )


def _held(claim: Claim) -> Any:
    return and_(jobs.c.id == claim.job_id, jobs.c.fence == claim.fence, jobs.c.state == RUNNING)


def _change(connection: Connection, job_id: str, **values: Any) -> None:
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(version=jobs.c.version + 1, **values))


def _change_held(connection: Connection, claim: Claim, **values: Any) -> int:
    statement = update(jobs).where(_held(claim)).values(version=jobs.c.version + 1, **values)
    return connection.execute(statement).rowcount


def _check(changed: int, claim: Claim) -> None:
    if changed != 1:
        msg = f"a job must be the worker's own to be changed: got job {claim.job_id}, cancelled or given to another."
        raise JobLost(msg)


def _check_ended(connection: Connection, claim: Claim, state: str) -> None:
    own = and_(jobs.c.id == claim.job_id, jobs.c.fence == claim.fence, jobs.c.state == state)
    _check(len(connection.execute(select(jobs.c.id).where(own)).all()), claim)


def _end_attempt(connection: Connection, job_id: str, fence: int, outcome: str) -> None:
    own = and_(attempts.c.job_id == job_id, attempts.c.fence == fence)
    connection.execute(update(attempts).where(own).values(ended_at=now_s(), outcome=outcome))


def _lost_problem(count: int) -> dict[str, Any]:
    return {
        "type": "about:blank",
        "title": "Worker lost",
        "status": 500,
        "detail": (
            f"a worker must survive its job: {count} were lost while they had this one, as when memory runs out. "
            "Look at the server's log, and ask for less."
        ),
    }


def _lock_number(fingerprint: str) -> int:
    """Returns a number of PostgreSQL's bigint."""
    return int(fingerprint[:15], 16)
