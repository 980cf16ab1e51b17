"""Plans: a budget in, a plan out; and why each unit got its format."""

from functools import partial
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Path, Request, Response

from allocator.service.access import plan_scope, read_scope
from allocator.service.answers import IdempotentRoute, encode, json_response, tagged_response
from allocator.service.bodies import NewPlan
from allocator.service.plan_answers import Answer, Question, make_full_plan
from allocator.service.plan_documents import plan_document, unit_document
from allocator.service.problem_details import raise_not_found, refused
from allocator.service.queries import Cursor, Identifier, Limit
from allocator.service.replies import Items, PlanReply, PlanSummary, UnitReply
from allocator.service.resource_documents import plan_summary
from allocator.service.schema import plans, profiles
from allocator.service.state import Service, ServiceOf, solver_limiter_of
from allocator.service.times import iso_time

router = APIRouter(prefix="/plans", tags=["plans"], route_class=IdempotentRoute)


@router.post(
    "",
    dependencies=[plan_scope],
    responses={200: {"model": PlanReply}},
    summary="Find the plan that loses least under a budget",
)
async def create_plan(body: NewPlan, request: Request, service: ServiceOf) -> Response:
    """Answers within milliseconds from a profile in memory; the same question always gives the same plan."""
    with refused():
        budget = body.make_budget()
    question = Question(profile_id=body.profile_id, budget=budget, metric=body.metric, engine=body.engine)
    # What is known already need not wait behind what is solved.
    limiter = None if service.plans.holds(question) else solver_limiter_of(request)
    encoded = await anyio.to_thread.run_sync(partial(_answer, service, question), limiter=limiter)
    return Response(encoded, media_type="application/json")


@router.get(
    "", dependencies=[read_scope], responses={200: {"model": Items[PlanSummary]}}, summary="List plans, newest first"
)
def list_plans(service: ServiceOf, limit: Limit = 50, cursor: Cursor = None, model_id: Identifier = None) -> Response:
    """Lists plans without their choices."""
    with refused():
        page = service.records.list_page(plans, limit=limit, cursor=cursor, model_id=model_id)
    items = [
        {
            "id": row.id,
            "profile_id": row.profile_id,
            "model_id": row.model_id,
            "created_at": iso_time(row.created_at),
            "summary": plan_summary(row),
        }
        for row in page.rows
    ]
    return json_response({"items": items, "next_cursor": page.next_cursor})


@router.get("/{plan_id}", dependencies=[read_scope], responses={200: {"model": PlanReply}}, summary="A plan")
def read_plan(plan_id: str, request: Request, service: ServiceOf) -> Response:
    """Returns a plan, with its measured quality once a job 'evaluate' has succeeded."""
    return tagged_response(request, _encode(service, _find(service, plan_id)))


@router.get("/{plan_id}/file", dependencies=[read_scope], summary="A plan as the file that the command takes")
def read_plan_file(plan_id: str, request: Request, service: ServiceOf) -> Response:
    """Returns the plan as ``bitplan plan --out`` writes it."""
    return tagged_response(request, make_full_plan(_find(service, plan_id)).to_dict())


@router.get(
    "/{plan_id}/units/{unit:path}",
    dependencies=[read_scope],
    responses={200: {"model": UnitReply}},
    summary="Why a unit got its format",
)
def read_unit(
    plan_id: str, unit: Annotated[str, Path(max_length=500)], request: Request, service: ServiceOf
) -> Response:
    """Returns the bytes, loss and price of each format of a unit: the chosen one has the least price."""
    document = unit_document(_find(service, plan_id), unit)
    if document is None:
        raise_not_found("a unit of the plan", unit)
    return tagged_response(request, document)


def _answer(service: Service, question: Question) -> bytes:
    profile_id = question.profile_id
    model_id = service.model_of_profile.get_or_make(profile_id, lambda: _find_model(service, profile_id))
    with refused():
        answer = service.plans.answer(question, model_id)
    return _encode(service, answer)


def _find_model(service: Service, profile_id: str) -> str:
    row = service.records.find(profiles, profile_id)
    if row is None:
        raise_not_found("a profile", profile_id)
    return str(row.model_id)


def _encode(service: Service, answer: Answer) -> bytes:
    job_id, evaluation = service.records.last_evaluation(answer.plan_id) or (None, None)
    held = service.documents.get(answer.plan_id)
    if held is not None and held[0] == job_id:
        return held[1]
    encoded = encode(plan_document(answer, evaluation))
    service.documents.put(answer.plan_id, (job_id, encoded))
    return encoded


def _find(service: Service, plan_id: str) -> Answer:
    answer = service.plans.find(plan_id)
    if answer is None:
        raise_not_found("a plan", plan_id)
    return answer
