"""From the body of a request to a job: what it needs is there, and equal requests have equal fingerprints."""

from pathlib import Path
from typing import Any

from allocator.service.bodies import NewJob
from allocator.service.job_kinds import NEED_PLAN
from allocator.service.job_options import COMPARISON, SAMPLED, TEXTS, check_options, list_texts
from allocator.service.job_queue import JobRequest
from allocator.service.model_facts import content_signature
from allocator.service.problem_details import Problem, raise_not_found, refused
from allocator.service.schema import models, plans
from allocator.service.state import Service
from sensitivity.profile import fingerprint_of

# Raised whenever the same request leaves more behind than before: what was done is then done again.
REQUEST_VERSION = 2


def make_job_request(body: NewJob, service: Service) -> JobRequest:
    """Returns the job of a body.

    Raises:
        Problem: If the model or the plan is unknown or missing, or an option is wrong.
        ForbiddenPath: If a text is not below the allowed directories.
    """
    model_id = _find_model(body, service)
    row = service.records.find(models, model_id)
    if row is None:
        raise_not_found("a model", model_id)
    with refused():
        check_options(COMPARISON if body.plan_ids else body.kind, body.options, service.settings.model_roots)
    plan_id, options = body.plan_id, body.options
    if body.plan_ids is not None:
        plan_id, options = body.plan_ids[0], {**options, "plan_ids": body.plan_ids}
    asked: dict[str, Any] = {"version": REQUEST_VERSION, "kind": body.kind, "model_id": model_id}
    asked |= {"plan_id": plan_id, "options": options}
    texts = list_texts(body.options, (*TEXTS, "text"), service.settings.model_roots)
    try:
        files = [Path(row.path), *(Path(text) for text in texts.values() if text not in (None, SAMPLED))]
        signature = [content_signature(file) for file in files]
    except OSError as error:
        raise Problem(409, f"a model's files must be where they were: got '{row.name}', which is not.") from error
    fingerprint = fingerprint_of({**asked, "content": signature})
    return JobRequest(kind=body.kind, model_id=model_id, plan_id=plan_id, options=options, fingerprint=fingerprint)


def _find_model(body: NewJob, service: Service) -> str:
    if body.kind not in NEED_PLAN:
        if body.model_id is None or body.plan_id is not None or body.plan_ids is not None:
            raise Problem(400, f"a job '{body.kind}' must name a model_id, and no plan: got {_named(body)}.")
        return body.model_id
    named = body.plan_ids or ([] if body.plan_id is None else [body.plan_id])
    if not named or (body.plan_ids is not None and (body.kind != "report" or body.plan_id is not None)):
        raise Problem(400, f"a job '{body.kind}' must name a plan_id, or a 'report' two plan_ids: got {_named(body)}.")
    return _find_common_model(named, body, service)


def _find_common_model(named: list[str], body: NewJob, service: Service) -> str:
    found = set()
    for plan_id in named:
        plan = service.records.find(plans, plan_id)
        if plan is None:
            raise_not_found("a plan", plan_id)
        found.add(str(plan.model_id))
    if len(found) != 1 or body.model_id not in (None, *found):
        raise Problem(400, f"plans must belong to one model: got {_named(body)}. Leave model_id out.")
    return found.pop()


def _named(body: NewJob) -> str:
    return f"model_id={body.model_id}, plan_id={body.plan_id}, plan_ids={body.plan_ids}"
