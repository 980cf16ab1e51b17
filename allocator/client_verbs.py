"""What a client asks of a service for each verb, as steps: the same for a client that waits and for one that awaits.

A verb is a generator of steps (``allocator.client_requests``), and returns the verb's result. Who runs it
(``allocator.client``) knows of connections and repeats; this file does not.
"""

import dataclasses
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from allocator.budget import LATENCY, MEMORY, Budget, InfeasibleBudget
from allocator.client_requests import Call, Fetch, ServiceError, Steps, Wait
from allocator.plans import Evaluation
from allocator.progress import Progress
from runtime.files import atomic_directory

_LOOK_EVERY_S = 0.3


@dataclass(frozen=True, kw_only=True)
class RemoteProfile:
    """A profile that a service holds.

    Args:
        id: Its name there.
        model_id: Its model's.
        document: Units, bytes, losses.
    """

    id: str
    model_id: str
    document: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RemotePlan:
    """A plan that a service holds.

    Args:
        id: Its name there.
        model_id: Its model's.
        document: Choice, bytes, predicted loss and proof.
    """

    id: str
    model_id: str
    document: Mapping[str, Any]


def measure(model: str, options: Mapping[str, Any], progress: Progress) -> Steps:
    """Returns the profile of a model.

    Args:
        model: Path of the model on the server.
        options: Fields of ``MeasureRequest`` and ``MeasureConfig`` with other values than their defaults.
        progress: Called with (stage, done, total).
    """
    model_id = (yield Call(method="POST", path="/models", body={"path": model}))["id"]
    body = {"kind": "measure", "model_id": model_id, "options": dict(options)}
    result = yield from _finish(body, progress)
    return (yield from profile(result["profile_id"]))


def profile(profile_id: str) -> Steps:
    """Returns a profile by its name."""
    document = yield Call(method="GET", path=f"/profiles/{profile_id}")
    return RemoteProfile(id=document["id"], model_id=document["model_id"], document=document)


def latest_profile(model: str) -> Steps:
    """Returns the profile that was measured last for a model.

    Raises:
        ServiceError: If there is none.
    """
    found = yield Call(method="POST", path="/models", body={"path": model})
    if not found["profiles"]:
        msg = f"a model must be measured before it is planned: got '{model}' without a profile. Measure it."
        raise ServiceError(msg, status=404, problem={})
    return (yield from profile(found["profiles"][0]["id"]))


def plan(profile_id: str, budget: Budget, metric: str | None, engine: str | None) -> Steps:
    """Returns the plan of a budget.

    Raises:
        InfeasibleBudget: If nothing keeps the budget.
    """
    body: dict[str, Any] = {
        "profile_id": profile_id,
        "budget": _budget_body(budget),
        "metric": metric,
        "engine": engine,
        "context": budget.context,
        "batch": budget.batch,
    }
    document = yield Call(method="POST", path="/plans", body={k: v for k, v in body.items() if v is not None})
    return RemotePlan(id=document["id"], model_id=document["model_id"], document=document)


def plan_file(plan_id: str) -> Steps:
    """Returns a plan as the record that ``allocator.load_plan`` reads."""
    return (yield Call(method="GET", path=f"/plans/{plan_id}/file"))


def frontier(profile_id: str, axes: Mapping[str, Any]) -> Steps:
    """Returns the points of least loss.

    Args:
        profile_id: The profile.
        axes: Keyword arguments of ``allocator.frontier``.
    """
    resource = axes.get("resource") or MEMORY
    asked = {**axes, "resource": "bytes" if resource == MEMORY else resource}
    query = urlencode({name: value for name, value in asked.items() if value is not None})
    document = yield Call(method="GET", path=f"/frontiers/{profile_id}?{query}")
    return document["points"]


def evaluate(plan_id: str, text: str | None, progress: Progress) -> Steps:
    """Returns the measured quality of the reference, the plan and the uniform formats."""
    result = yield from _finish(_job("evaluate", plan_id, text=text), progress)
    return [Evaluation(**row) for row in result["evaluation"]]


def apply(plan_id: str, out: Path, progress: Progress) -> Steps:
    """Fetches a model packed by a plan, and returns its directory."""
    result = yield from _finish(_job("apply", plan_id), progress)
    return (yield from _fetch_export(result["export_id"], out))


def export(plan_id: str, engine: str, out: Path, progress: Progress) -> Steps:
    """Fetches a plan as the files that an engine loads, and returns the command that runs them."""
    result = yield from _finish(_job("export", plan_id, engine=engine), progress)
    yield from _fetch_export(result["export_id"], out)
    document = yield Call(method="GET", path=f"/exports/{result['export_id']}")
    return document["command"].replace("DIRECTORY", str(out))


def report(plan_id: str, out: Path, options: Mapping[str, Any], progress: Progress) -> Steps:
    """Fetches the report of a plan, and returns its page's path.

    Args:
        plan_id: The plan.
        out: Directory of the files.
        options: Options of the job.
        progress: Called with (stage, done, total).
    """
    result = yield from _finish(_job("report", plan_id, **options), progress)
    yield from _fetch_report(result["report_id"], out)
    return out / "report.html"


def compare(plan_ids: tuple[str, str], out: Path, text: str | None, progress: Progress) -> Steps:
    """Fetches the comparison of two plans, and returns its page's path."""
    options = {} if text is None else {"text": text}
    result = yield from _finish({"kind": "report", "plan_ids": list(plan_ids), "options": options}, progress)
    yield from _fetch_report(result["report_id"], out)
    return out / "comparison.html"


def raise_problem(status: int, content: bytes) -> None:
    """Raises what an answer says that is no success.

    Raises:
        InfeasibleBudget: If it is that a budget cannot be kept.
        ServiceError: Otherwise.
    """
    try:
        problem = json.loads(content)
        detail = str(problem["detail"])
    except (ValueError, KeyError, TypeError):
        problem, detail = {}, f"the service must answer with its documents: got status {status}. Is this its address?"
    least = problem.get("least_reachable")
    if least is not None:
        raise InfeasibleBudget(detail, least_use={MEMORY if n == "bytes" else n: v for n, v in least.items()})
    raise ServiceError(detail, status=status, problem=problem)


def options_of(request: Any) -> dict[str, Any]:
    """Returns a ``MeasureRequest`` as a job's options: what differs from the defaults."""
    defaults = type(request)()
    changed: dict[str, Any] = {}
    for given, usual in ((request, defaults), (request.config, defaults.config)):
        for name in (f.name for f in dataclasses.fields(given) if f.name != "config"):
            if getattr(given, name) != getattr(usual, name):
                changed[name] = getattr(given, name)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def _budget_body(budget: Budget) -> dict[str, float]:
    unknown = [name for name in budget.limits if name != LATENCY]
    if unknown:
        msg = f"a service takes limits on {LATENCY} alone: got {unknown}. Plan locally, or leave them out."
        raise ValueError(msg)
    given = {
        "bytes": budget.memory_bytes,
        "bits_per_weight": budget.bits_per_weight,
        "max_kl": budget.max_kl,
        LATENCY: budget.limits.get(LATENCY),
    }
    return {name: value for name, value in given.items() if value is not None}


def _job(kind: str, plan_id: str, **options: Any) -> dict[str, Any]:
    return {"kind": kind, "plan_id": plan_id, "options": {k: v for k, v in options.items() if v is not None}}


def _finish(body: dict[str, Any], progress: Progress) -> Steps:
    """Submits a job, waits for its end, and returns its result."""
    job = yield Call(method="POST", path="/jobs", body=body)
    while job["state"] in ("queued", "running"):
        if job["state"] == "running" and job["progress"]["total"]:
            progress(job["progress"]["stage"], job["progress"]["done"], job["progress"]["total"])
        yield Wait(seconds=_LOOK_EVERY_S)
        job = yield Call(method="GET", path=f"/jobs/{job['id']}")
    if job["state"] != "succeeded":
        problem = job["error"] or {"detail": f"the job {job['id']} was cancelled."}
        raise ServiceError(problem["detail"], status=int(problem.get("status", 409)), problem=problem)
    return job["result"]


def _fetch_export(export_id: str, out: Path) -> Steps:
    with atomic_directory(out) as directory:
        archive = directory / ".archive.tar"
        yield Fetch(path=f"/exports/{export_id}/archive", out=archive)
        with tarfile.open(archive) as opened:
            opened.extractall(directory, filter="data")
        archive.unlink()
    return out


def _fetch_report(report_id: str, out: Path) -> Steps:
    document = yield Call(method="GET", path=f"/reports/{report_id}")
    out.mkdir(parents=True, exist_ok=True)
    for file in document["files"]:
        target = _place(out, file["name"])
        target.parent.mkdir(parents=True, exist_ok=True)
        yield Fetch(path=file["url"], out=target)


def _place(out: Path, name: str) -> Path:
    """Returns where a file of the server's goes: below the directory, whatever its name."""
    target = (out / name).resolve()
    if not target.is_relative_to(out.resolve()):
        msg = f"files of a report must lie in its directory: got '{name}'. Trust this server with nothing."
        raise ServiceError(msg, status=502, problem={})
    return target
