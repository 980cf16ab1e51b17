"""Jobs: submit, watch, cancel."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Row
from starlette.concurrency import run_in_threadpool

from allocator.service.access import plan_scope, read_scope
from allocator.service.answers import IdempotentRoute, json_response
from allocator.service.bodies import NewJob
from allocator.service.problem_details import Problem, raise_not_found, refused
from allocator.service.queries import Cursor, Identifier, Limit
from allocator.service.replies import Items, JobReply
from allocator.service.resource_documents import job_document
from allocator.service.schema import ENDED, jobs
from allocator.service.state import Service, ServiceOf
from allocator.service.submissions import make_job_request

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=IdempotentRoute)
_QUIET_S = 15.0


@router.post(
    "",
    dependencies=[plan_scope],
    status_code=202,
    responses={200: {"model": JobReply}, 202: {"model": JobReply}},
    summary="Ask for work",
)
def create_job(body: NewJob, service: ServiceOf) -> Response:
    """Returns the new job (202), or the one that does or did the same already (200)."""
    job_id, new = service.queue.submit(make_job_request(body, service))
    headers = {"Location": f"/jobs/{job_id}"}
    return json_response(job_document(_find(service, job_id)), status=202 if new else 200, headers=headers)


@router.get(
    "", dependencies=[read_scope], responses={200: {"model": Items[JobReply]}}, summary="List jobs, newest first"
)
def list_jobs(
    service: ServiceOf,
    limit: Limit = 50,
    cursor: Cursor = None,
    state: Annotated[Literal["queued", "running", "succeeded", "failed", "cancelled"] | None, Query()] = None,
    model_id: Identifier = None,
) -> Response:
    """Lists jobs, of one state or of one model."""
    with refused():
        page = service.records.list_page(jobs, limit=limit, cursor=cursor, state=state, model_id=model_id)
    return json_response({"items": [job_document(row) for row in page.rows], "next_cursor": page.next_cursor})


@router.get("/{job_id}", dependencies=[read_scope], responses={200: {"model": JobReply}}, summary="A job")
def read_job(job_id: str, service: ServiceOf) -> Response:
    """Returns a job."""
    return json_response(job_document(_find(service, job_id)))


@router.delete("/{job_id}", dependencies=[plan_scope], responses={200: {"model": JobReply}}, summary="Cancel a job")
def cancel_job(job_id: str, service: ServiceOf) -> Response:
    """Cancels a job that waits or runs. One that is cancelled already is answered as it is."""
    row = _find(service, job_id)
    if not service.queue.cancel(job_id) and (row := _find(service, job_id)).state != "cancelled":
        raise Problem(409, f"a job must wait or run to be cancelled: got one that is {row.state}.")
    return json_response(job_document(_find(service, job_id)))


@router.get(
    "/{job_id}/events",
    dependencies=[read_scope],
    summary="Watch a job",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
async def watch_job(job_id: str, service: ServiceOf) -> StreamingResponse:
    """Sends the job as an event 'job' on every change, and an event 'end' when it is over."""
    await run_in_threadpool(_find, service, job_id)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(service, job_id), media_type="text/event-stream", headers=headers)


async def _events(service: Service, job_id: str) -> AsyncIterator[str]:
    version, quiet_s = 0, 0.0
    while True:
        row = await run_in_threadpool(service.records.find, jobs, job_id)
        if row is None:
            return
        if row.version != version:
            version, quiet_s = row.version, 0.0
            yield _event("job", job_document(row), version)
        if row.state in ENDED:
            yield _event("end", {"state": row.state}, version)
            return
        await anyio.sleep(service.settings.poll_s)
        quiet_s += service.settings.poll_s
        if quiet_s >= _QUIET_S:
            quiet_s = 0.0
            # A comment, so that proxies keep the connection.
            yield ": waiting\n\n"


def _event(name: str, data: dict[str, Any], version: int) -> str:
    return f"event: {name}\nid: {version}\ndata: {json.dumps(data)}\n\n"


def _find(service: Service, job_id: str) -> Row[Any]:
    row = service.records.find(jobs, job_id)
    if row is None:
        raise_not_found("a job", job_id)
    return row
