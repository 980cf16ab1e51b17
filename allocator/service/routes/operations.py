"""What operators and pages ask for: engines, health, metrics."""

from fastapi import APIRouter, Request, Response
from sqlalchemy import text

from allocator.service.access import read_scope
from allocator.service.answers import json_response, tagged_response
from allocator.service.replies import EngineReply, Items
from allocator.service.resource_documents import engine_document
from allocator.service.state import ServiceOf

router = APIRouter(tags=["operations"])


@router.get(
    "/engines",
    dependencies=[read_scope],
    responses={200: {"model": Items[EngineReply]}},
    summary="What engines can load",
)
def list_engines(request: Request) -> Response:
    """Lists the engines that plans can be made and exported for, with their rules."""
    from runtime.engines import describe_engines

    items = [engine_document(engine) for engine in describe_engines()]
    return tagged_response(request, {"items": items, "next_cursor": None})


@router.get("/healthz", summary="Whether the process answers")
def read_health() -> Response:
    """Answers while the process does, whatever becomes of the database."""
    return json_response({"status": "ok"})


@router.get("/readyz", summary="Whether the service can work")
def read_readiness(service: ServiceOf) -> Response:
    """Answers 200 where the database can be written, 503 otherwise."""
    with service.database.writing() as connection:
        connection.execute(text("DELETE FROM answers WHERE id = ''"))
        # A page that is really written: a full disk shows itself here and not in the next request.
        connection.execute(text("INSERT INTO answers (id, body_hash, created_at) VALUES ('', '', 0)"))
        connection.execute(text("DELETE FROM answers WHERE id = ''"))
    return json_response({"status": "ready"})


@router.get(
    "/metrics",
    dependencies=[read_scope],
    summary="Counters for Prometheus",
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def read_metrics(service: ServiceOf) -> Response:
    """Returns requests, their times, jobs by state, and workers."""
    body = service.metrics.render(service.records.count_jobs(), service.workers_alive())
    return Response(body, media_type="text/plain; version=0.0.4; charset=utf-8")
