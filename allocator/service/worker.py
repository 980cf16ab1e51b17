"""A worker: a process that takes one job after the other, renews its lease, and stops when the job is not its own.

The verb runs in the main thread. Its progress is written at most a few times a second; the callback raises where the
job was cancelled or given away, and so ends the verb. A second thread renews the lease, and ends the process where a
verb goes on without progress for longer than it may.
"""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from allocator.failures import describe_failure
from allocator.service.database import Database, Unavailable
from allocator.service.job_kinds import JOB_KINDS, JobContext, delete_older_places, delete_place
from allocator.service.job_queue import Claim, JobLost, JobQueue
from allocator.service.records import Records
from allocator.service.settings import ServiceSettings
from allocator.service.stop_signals import Stopping, StopSignals
from allocator.store import Store

log = logging.getLogger("bitplan.worker")
_WRITE_EVERY_S = 0.3
# How long a verb may go on after its job is lost, until its next progress.
_GRACE_S = 10.0
_UNITS = {"verify": "plans", "prediction_fit": "plans", "apply": "models", "export": "models"}


class Hold:
    """A worker's hold on a job: its lease, renewed by a thread, and its progress.

    Args:
        queue: The queue.
        claim: The job.
    """

    def __init__(self, queue: JobQueue, claim: Claim) -> None:
        self.queue = queue
        self.claim = claim
        self._lost = threading.Event()
        self._over = threading.Event()
        self._written_at = 0.0
        self._stage = ""
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> "Hold":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def progress(self, stage: str, done: int, total: int) -> None:
        """Writes how far the job is.

        Raises:
            JobLost: If the job is no longer the worker's.
        """
        if self._lost.is_set():
            msg = f"a job must be the worker's own: got job {self.claim.job_id}, cancelled or given to another."
            raise JobLost(msg)
        now = time.monotonic()
        if stage == self._stage and done != total and now - self._written_at < _WRITE_EVERY_S:
            return
        self._stage, self._written_at = stage, now
        unit = _UNITS.get(stage, "steps")
        try:
            self.queue.report(self.claim, {"stage": stage, "done": done, "total": total, "unit": unit})
        except Unavailable as error:
            # The measurement goes on: its lease, and its end, are tried again.
            log.warning("progress not written", extra={"job": self.claim.job_id, "reason": str(error)})

    def _keep(self) -> None:
        while not self._over.wait(self.queue.lease_s / 4):
            try:
                self.queue.renew(self.claim)
            except JobLost:
                self._lost.set()
                if not self._over.wait(_GRACE_S):
                    log.warning("job lost, process ends", extra={"job": self.claim.job_id})
                    os._exit(3)
                return
            except Unavailable as error:
                log.warning("lease not renewed", extra={"job": self.claim.job_id, "reason": str(error)})


class Worker:
    """A worker.

    Args:
        settings: The service's settings.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.database = Database(settings.url)
        self.queue = JobQueue(self.database, lease_s=settings.lease_s, most_attempts=settings.most_attempts)
        self.records = Records(self.database)
        self.store = Store(settings.store_root)
        self.stops = StopSignals()

    def run(self) -> None:
        """Takes jobs until the process is told to stop."""
        while True:
            try:
                worked = self.run_once()
            except Unavailable as error:
                log.warning("queue not reachable", extra={"reason": str(error)})
                worked = False
            if not worked:
                time.sleep(self.settings.poll_s)

    def run_once(self) -> bool:
        """Takes one job, if there is one, and does it; returns whether there was one."""
        # From the moment that a job is the worker's a signal must give it back.
        with self.stops.later():
            claim = self.queue.claim(self.name)
            if claim is None:
                return False
            about = {"job": claim.job_id, "kind": claim.kind, "fence": claim.fence}
            log.info("job taken", extra=about)
            with Hold(self.queue, claim) as hold:
                context = JobContext(
                    claim=claim, settings=self.settings, records=self.records, store=self.store, progress=hold.progress
                )
                try:
                    with self.stops.at_once():
                        delete_older_places(context)
                        self._do(context)
                except JobLost:
                    delete_place(context)
                    log.info("job lost", extra=about)
                except Stopping:
                    self._give_back(context)
                    raise
        return True

    def _give_back(self, context: JobContext) -> None:
        try:
            self.queue.release(context.claim)
        except (JobLost, Unavailable):
            # It may have ended just before the signal: then what it wrote is the job's.
            return
        delete_place(context)

    def _do(self, context: JobContext) -> None:
        claim = context.claim
        try:
            context.progress("starting", 0, 1)
            outcome = JOB_KINDS[claim.kind](context)
        except (JobLost, Stopping):
            raise
        except Exception as error:
            delete_place(context)
            problem = describe_problem(error)
            is_defect = problem["status"] == HTTPStatus.INTERNAL_SERVER_ERROR
            log.warning("job failed", extra={"job": claim.job_id, "reason": problem["detail"]}, exc_info=is_defect)
            _insist(lambda: self.queue.fail(claim, problem))
            return
        _insist(lambda: self.queue.succeed(claim, outcome.result, outcome.record))
        log.info("job succeeded", extra={"job": claim.job_id, "fence": claim.fence})


def describe_problem(error: Exception) -> dict[str, Any]:
    """Returns what went wrong in a job as problem details; a defect's own words stay in the log."""
    described = describe_failure(error)
    if described is None:
        detail = f"the job met a defect of the program ({type(error).__name__}). The server's log has the details."
        return {"type": "about:blank", "title": "Internal error", "status": 500, "detail": detail}
    return {"type": "about:blank", "title": "Job failed", "status": 422, "detail": described}


def _insist(end: Callable[[], None]) -> None:
    """Ends a job, however long the database is away: what was done is not thrown away."""
    wait_s = 0.2
    while True:
        try:
            end()
            return
        except Unavailable as error:
            log.warning("end of a job not written yet", extra={"reason": str(error)})
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, 5.0)


def run_worker(settings: ServiceSettings, *, watch_stdin: bool = False) -> None:
    """Works until told to stop by a signal, or by the end of its standard input: its server is gone then.

    Args:
        settings: The service's settings.
        watch_stdin: Whether a server holds the other end of the standard input.
    """
    worker = Worker(settings)
    try:
        worker.stops.listen()
        if watch_stdin:
            threading.Thread(target=_end_with_stdin, daemon=True).start()
        log.info("worker starts", extra={"worker": worker.name})
        worker.run()
    except Stopping:
        log.info("worker stops", extra={"worker": worker.name})


def _end_with_stdin() -> None:
    # Not through sys.stdin: the process cannot end in peace while a thread holds its lock.
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    # A verb deep in compiled code hears no signal.
    time.sleep(_GRACE_S)
    os._exit(4)
