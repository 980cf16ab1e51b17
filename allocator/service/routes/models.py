"""Models and profiles: what is known, and what was measured."""

import hashlib
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Row

from allocator.budget import LATENCY, MEMORY
from allocator.service.access import admin_scope, read_scope
from allocator.service.allowed_paths import check_contents, resolve_below
from allocator.service.answers import IdempotentRoute, json_response, tagged_response
from allocator.service.bodies import NewModel
from allocator.service.model_facts import describe_model
from allocator.service.priced_profiles import Axes
from allocator.service.problem_details import Problem, raise_not_found, refused
from allocator.service.profile_documents import frontier_document, profile_document
from allocator.service.queries import Cursor, Identifier, Limit
from allocator.service.replies import FrontierReply, Items, ModelReply, Named, ProfileReply
from allocator.service.resource_documents import model_document
from allocator.service.schema import models, profiles
from allocator.service.state import Service, ServiceOf
from allocator.service.times import iso_time

router = APIRouter(tags=["models and profiles"], route_class=IdempotentRoute)


@router.get(
    "/models",
    dependencies=[read_scope],
    responses={200: {"model": Items[ModelReply]}},
    summary="List models, newest first",
)
def list_models(service: ServiceOf, limit: Limit = 50, cursor: Cursor = None) -> Response:
    """Lists models with their newest jobs, profiles and plans."""
    with refused():
        page = service.records.list_page(models, limit=limit, cursor=cursor)
    items = [model_document(row, service.records) for row in page.rows]
    return json_response({"items": items, "next_cursor": page.next_cursor})


@router.post(
    "/models",
    dependencies=[admin_scope],
    status_code=201,
    responses={201: {"model": ModelReply}},
    summary="Make a model known",
)
def create_model(body: NewModel, service: ServiceOf) -> Response:
    """Reads the model's configuration; its weights are read by a job 'measure'. The same path is the same model."""
    text = body.path or body.reference
    if text is None or (body.path and body.reference):
        raise Problem(400, "a model must be named by one of path and reference: got both or neither.")
    roots = service.settings.model_roots
    path = resolve_below(text, roots)
    if path.is_dir():
        check_contents(path, roots)
    with refused():
        facts = describe_model(path)
    key = hashlib.sha256(str(path).encode()).hexdigest()[:32]
    row = service.records.add_model(key, name=body.name or path.name, path=str(path), facts=facts)
    headers = {"Location": f"/models/{key}"}
    return json_response(model_document(row, service.records), status=201, headers=headers)


@router.get("/models/{model_id}", dependencies=[read_scope], responses={200: {"model": ModelReply}}, summary="A model")
def read_model(model_id: str, request: Request, service: ServiceOf) -> Response:
    """Returns a model with its newest job, profiles and plans."""
    row = service.records.find(models, model_id)
    if row is None:
        raise_not_found("a model", model_id)
    return tagged_response(request, model_document(row, service.records))


@router.get(
    "/profiles",
    dependencies=[read_scope],
    responses={200: {"model": Items[Named]}},
    summary="List profiles, newest first",
)
def list_profiles(
    service: ServiceOf, limit: Limit = 50, cursor: Cursor = None, model_id: Identifier = None
) -> Response:
    """Lists profiles."""
    with refused():
        page = service.records.list_page(profiles, limit=limit, cursor=cursor, model_id=model_id)
    items = [{"id": r.id, "model_id": r.model_id, "created_at": iso_time(r.created_at)} for r in page.rows]
    return json_response({"items": items, "next_cursor": page.next_cursor})


@router.get(
    "/profiles/{profile_id}",
    dependencies=[read_scope],
    responses={200: {"model": ProfileReply}},
    summary="A sensitivity profile",
)
def read_profile(profile_id: str, request: Request, service: ServiceOf) -> Response:
    """Returns the units, with the bytes and the loss of each format."""
    row = _find_profile(service, profile_id)
    priced = service.profiles.find(Axes(profile_id=row.id))
    created_at = iso_time(row.created_at)
    timed = service.profiles.is_timed(row.id)
    document = profile_document(priced, model_id=row.model_id, created_at=created_at, timed=timed)
    return tagged_response(request, document)


@router.get(
    "/frontiers/{profile_id}",
    dependencies=[read_scope],
    responses={200: {"model": FrontierReply}},
    summary="The least loss at every size",
)
def read_frontier(
    profile_id: str,
    request: Request,
    service: ServiceOf,
    resource: Annotated[Literal["bytes", "read_bytes", "latency_us"], Query()] = "bytes",
    metric: Annotated[str | None, Query(max_length=200)] = None,
    points: Annotated[int, Query(ge=2, le=257)] = 33,
    engine: Annotated[str | None, Query(max_length=200)] = None,
    context: Annotated[int | None, Query(ge=1, le=10**8)] = None,
    batch: Annotated[int, Query(ge=1, le=10**6)] = 1,
) -> Response:
    """Solves a budget at each of the points, kept in memory afterwards.

    Along ``bytes`` of the file, ``read_bytes`` or ``latency_us`` of a step; with a context the cache is part of them,
    with an engine its rules hold at each.
    """
    along = MEMORY if resource == "bytes" else resource
    axes = Axes(
        profile_id=_find_profile(service, profile_id).id,
        engine=engine,
        file_of=engine,
        context=context,
        batch=batch,
        timed=along == LATENCY,
    )
    with refused():
        priced = service.profiles.find(axes)
        document = service.frontiers.get_or_make(
            (axes, resource, metric, points),
            lambda: frontier_document(priced, metric=metric, points=points, along=along),
        )
    return tagged_response(request, document)


def _find_profile(service: Service, profile_id: str) -> Row[Any]:
    row = service.records.find(profiles, profile_id)
    if row is None:
        raise_not_found("a profile", profile_id)
    return row
