"""What the routes share, made once when the server starts."""

from dataclasses import dataclass
from typing import Annotated, Any, cast

from anyio import CapacityLimiter
from fastapi import Depends, Request

from allocator.service.api_keys import ApiKeys
from allocator.service.database import Database
from allocator.service.job_queue import JobQueue
from allocator.service.metrics import Metrics
from allocator.service.plan_answers import PlanAnswers
from allocator.service.priced_profiles import PricedProfiles
from allocator.service.recent import Recent
from allocator.service.records import Records
from allocator.service.settings import ServiceSettings
from allocator.service.supervisor import Supervisor
from allocator.store import Store


@dataclass(frozen=True, kw_only=True, eq=False)
class Service:
    """The parts of a running service.

    Args:
        settings: What it was told when it started.
        database: The database.
        records: Models, profiles, plans, artefacts.
        queue: Jobs.
        profiles: Profiles in memory.
        plans: Answers to budgets.
        documents: Plans as they were sent last, with the evaluation in them.
        model_of_profile: Models of the profiles that were asked for, which never change.
        frontiers: Frontiers that were asked for.
        keys: API keys.
        metrics: What is counted.
        supervisor: The server's workers.
    """

    settings: ServiceSettings
    database: Database
    records: Records
    queue: JobQueue
    profiles: PricedProfiles
    plans: PlanAnswers
    documents: Recent[str, tuple[str | None, bytes]]
    model_of_profile: Recent[str, str]
    frontiers: Recent[tuple[Any, ...], dict[str, Any]]
    keys: ApiKeys
    metrics: Metrics
    supervisor: Supervisor

    def workers_alive(self) -> int:
        """Returns the server's workers that run."""
        return self.supervisor.alive


def make_service(settings: ServiceSettings) -> Service:
    """Returns the parts of a service; nothing is read or written yet."""
    database = Database(settings.url)
    records = Records(database)
    profiles = PricedProfiles(Store(settings.store_root), settings.cached_profiles)
    return Service(
        settings=settings,
        database=database,
        records=records,
        queue=JobQueue(database, lease_s=settings.lease_s, most_attempts=settings.most_attempts),
        profiles=profiles,
        plans=PlanAnswers(records, profiles, settings.cached_plans),
        documents=Recent(settings.cached_plans),
        model_of_profile=Recent(settings.cached_plans),
        frontiers=Recent(settings.cached_plans),
        keys=ApiKeys(database),
        metrics=Metrics(),
        supervisor=Supervisor(settings),
    )


def service_of(request: Request) -> Service:
    """Returns the service that a request is sent to."""
    return cast(Service, request.app.state.service)


async def _give_service(request: Request) -> Service:
    # Asynchronous, so that no thread is taken for it.
    return service_of(request)


def solver_limiter_of(request: Request) -> CapacityLimiter:
    """Returns what limits the budgets that are answered at the same time."""
    return cast(CapacityLimiter, request.app.state.solver_limiter)


ServiceOf = Annotated[Service, Depends(_give_service)]
