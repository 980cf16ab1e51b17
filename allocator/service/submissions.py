"""From the body of a request to a job: what it needs is there, and equal requests have equal fingerprints."""

from pathlib import Path

from allocator.service.bodies import NewJob
from allocator.service.job_kinds import NEED_PLAN
from allocator.service.job_options import SAMPLED, TEXTS, check_options, list_texts
from allocator.service.job_queue import JobRequest
from allocator.service.model_facts import content_signature
from allocator.service.problem_details import Problem, raise_not_found, refused
from allocator.service.schema import models, plans
from allocator.service.state import Service
from sensitivity.profile import fingerprint_of


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
        check_options(body.kind, body.options, service.settings.model_roots)
    asked = {"kind": body.kind, "model_id": model_id, "plan_id": body.plan_id, "options": body.options}
    texts = list_texts(body.options, (*TEXTS, "text"), service.settings.model_roots)
    try:
        files = [Path(row.path), *(Path(text) for text in texts.values() if text not in (None, SAMPLED))]
        signature = [content_signature(file) for file in files]
    except OSError as error:
        raise Problem(409, f"a model's files must be where they were: got '{row.name}', which is not.") from error
    fingerprint = fingerprint_of({**asked, "content": signature})
    return JobRequest(
        kind=body.kind, model_id=model_id, plan_id=body.plan_id, options=body.options, fingerprint=fingerprint
    )


def _find_model(body: NewJob, service: Service) -> str:
    if body.kind not in NEED_PLAN:
        if body.model_id is None or body.plan_id is not None:
            raise Problem(400, f"a job '{body.kind}' must name a model_id, and no plan: got {_named(body)}.")
        return body.model_id
    if body.plan_id is None:
        raise Problem(400, f"a job '{body.kind}' must name a plan_id: got {_named(body)}.")
    plan = service.records.find(plans, body.plan_id)
    if plan is None:
        raise_not_found("a plan", body.plan_id)
    if body.model_id not in (None, plan.model_id):
        raise Problem(400, f"a plan must belong to the model: got {_named(body)}. Leave model_id out.")
    return str(plan.model_id)


def _named(body: NewJob) -> str:
    return f"model_id={body.model_id}, plan_id={body.plan_id}"
