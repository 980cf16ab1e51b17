"""What workers do: a kind of job is a verb of ``allocator``, its options, and what of its outcome is kept.

An entry of ``JOB_KINDS`` takes a ``JobContext`` and returns an ``Outcome``. Files are written to ``context.place``,
which belongs to this attempt alone: an attempt that loses its job deletes what it wrote, and touches nothing else.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from allocator.json_values import jsonable
from allocator.plans import Plan
from allocator.progress import Progress
from allocator.service.job_options import list_texts, make_measure_request
from allocator.service.job_queue import Claim
from allocator.service.plan_answers import rebuild_plan
from allocator.service.records import Records, add_artefact, add_profile
from allocator.service.schema import models, plans
from allocator.service.settings import ServiceSettings
from allocator.store import Store


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """What a job is done with.

    Args:
        claim: The job.
        settings: The service's settings.
        records: What the service knows.
        store: Measurements.
        progress: Called with (stage, done, total); raises where the job is no longer the worker's.
    """

    claim: Claim
    settings: ServiceSettings
    records: Records
    store: Store
    progress: Progress

    @property
    def artefact_id(self) -> str:
        """Name of what this attempt writes."""
        return f"{self.claim.job_id}-{self.claim.fence}"

    @property
    def place(self) -> Path:
        """Directory that this attempt writes."""
        return self.settings.directory / "artefacts" / self.artefact_id

    def model_path(self) -> str:
        """Returns the path of the job's model."""
        row = self.records.find(models, self.claim.model_id)
        assert row is not None, "jobs refer to models"
        return str(row.path)

    def plan(self) -> Plan:
        """Returns the job's plan."""
        assert self.claim.plan_id is not None, "checked when the job was submitted"
        return self._rebuild(self.claim.plan_id)

    def compared(self) -> tuple[Plan, Plan] | None:
        """Returns the two plans that the job compares, or None where it is of one."""
        plan_ids = self.claim.options.get("plan_ids")
        return None if plan_ids is None else (self._rebuild(plan_ids[0]), self._rebuild(plan_ids[1]))

    def _rebuild(self, plan_id: str) -> Plan:
        row = self.records.find(plans, plan_id)
        assert row is not None, "plans are never deleted"
        return rebuild_plan(row, self.store)

    def text(self) -> str | None:
        """Returns the path of the text that the options name, or None."""
        return list_texts(self.claim.options, ("text",), self.settings.model_roots)["text"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a job came to.

    Args:
        result: JSON values for whoever asked.
        record: Writes rows, in the transaction that ends the job.
    """

    result: Mapping[str, Any]
    record: Callable[[Connection], None] = field(default=lambda connection: None)


def measure(context: JobContext) -> Outcome:
    """Measures a model; pieces of an attempt that was killed are taken up."""
    from allocator.artefacts import Model
    from allocator.engine_files import note_engine_files
    from allocator.pipeline import measure as run
    from allocator.timings import find_latency

    request = make_measure_request(context.claim.options, context.settings.model_roots)
    model = Model(context.model_path(), low_memory=bool(context.claim.options.get("low_memory")))
    profile = run(model, request=request, store=context.store, progress=context.progress)
    note_engine_files(model, profile, context.store)
    if context.claim.options.get("latency"):
        find_latency(profile, context.store, context.progress)

    def record(connection: Connection) -> None:
        add_profile(connection, profile.fingerprint, context.claim.model_id)

    return Outcome(result={"profile_id": profile.fingerprint}, record=record)


def evaluate(context: JobContext) -> Outcome:
    """Measures a plan on held-out text, beside the reference and the uniform formats."""
    from allocator.pipeline import evaluate as run

    rows = run(
        context.model_path(), context.plan(), text=context.text(), store=context.store, progress=context.progress
    )
    return Outcome(result={"evaluation": [jsonable(asdict(row)) for row in rows]})


def apply(context: JobContext) -> Outcome:
    """Packs a model by a plan."""
    from allocator.pipeline import apply as run

    context.progress("apply", 0, 1)
    applied = run(context.model_path(), context.plan(), context.place, store=context.store)
    facts = {"engine": "bitplan", "command": "bitplan generate DIRECTORY --prompt 'The'"}
    return _written(context, "export", {**facts, "predicted_bytes": applied.predicted_bytes})


def export(context: JobContext) -> Outcome:
    """Writes a plan as the files that an engine loads."""
    from allocator.exporting import export as run

    engine = str(context.claim.options["engine"])
    context.progress("export", 0, 1)
    exported = run(context.model_path(), context.plan(), engine, context.place, store=context.store)
    # The command names the directory it was written to, which is not where it will be.
    command = exported.command.replace(str(context.place), "DIRECTORY").replace(context.model_path(), "MODEL")
    facts = {"engine": engine, "command": command, "predicted_bytes": exported.predicted_bytes}
    return _written(context, "export", facts)


def report(context: JobContext) -> Outcome:
    """Writes the report of a plan, or of two side by side."""
    from allocator.comparing import compare
    from allocator.pipeline import report as run

    measured: dict[str, Any] = {"text": context.text(), "store": context.store, "progress": context.progress}
    compared = context.compared()
    if compared is not None:
        names = _names_of(compared)
        compare(*compared, context.place, names=names, model=context.model_path(), **measured)
        return _written(context, "report", {"plan_ids": context.claim.options["plan_ids"]})
    files: dict[str, Any] = {name: bool(context.claim.options.get(name)) for name in ("pdf", "parquet")}
    run(context.model_path(), context.plan(), context.place, **files, **measured)
    return _written(context, "report", {})


def _names_of(compared: tuple[Plan, Plan]) -> tuple[str, str]:
    """Returns what a page calls two plans: their budgets, numbered where these are the same."""
    first, second = (plan.budget for plan in compared)
    return (first, second) if first != second else (f"{first} (first)", f"{second} (second)")


JOB_KINDS: dict[str, Callable[[JobContext], Outcome]] = {
    "measure": measure,
    "evaluate": evaluate,
    "apply": apply,
    "export": export,
    "report": report,
}
NEED_PLAN = ("evaluate", "apply", "export", "report")


def delete_place(context: JobContext) -> None:
    """Deletes what an attempt wrote that is no longer the job's."""
    shutil.rmtree(context.place, ignore_errors=True)


def delete_older_places(context: JobContext) -> None:
    """Deletes what earlier attempts of the job left when they were killed, under whatever name."""
    for path in context.place.parent.glob(f"*{context.claim.job_id}-*"):
        if path.name != context.artefact_id:
            shutil.rmtree(path, ignore_errors=True)


def _written(context: JobContext, kind: str, facts: Mapping[str, Any]) -> Outcome:
    files = [
        {"name": str(path.relative_to(context.place)), "bytes": path.stat().st_size}
        for path in sorted(context.place.rglob("*"))
        if path.is_file()
    ]
    row: dict[str, Any] = {
        "id": context.artefact_id,
        "kind": kind,
        "job_id": context.claim.job_id,
        "model_id": context.claim.model_id,
        "plan_id": context.claim.plan_id,
        "facts": json.dumps(jsonable({**facts, "files": files})),
    }

    def record(connection: Connection) -> None:
        add_artefact(connection, **row)

    return Outcome(result={f"{kind}_id": context.artefact_id}, record=record)
