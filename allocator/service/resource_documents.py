"""Models, jobs, artefacts and engines as JSON."""

import json
import mimetypes
from typing import Any

from sqlalchemy import Row

from allocator.service.records import Records
from allocator.service.schema import jobs, plans, profiles
from allocator.service.times import iso_time

_MEDIA_TYPES = {
    ".md": "text/markdown",
    ".parquet": "application/vnd.apache.parquet",
    ".safetensors": "application/octet-stream",
    ".gguf": "application/octet-stream",
}


def model_document(row: Row[Any], records: Records) -> dict[str, Any]:
    """Returns a model with its newest job, profiles and plans."""
    newest = records.related(jobs, row.id, limit=1)
    facts = json.loads(row.facts)
    return {
        "id": row.id,
        "name": row.name,
        "reference": row.path,
        "created_at": iso_time(row.created_at),
        **{name: facts.get(name) for name in ("architecture", "parameters", "units", "layers", "experts_per_layer")},
        "bytes": facts["bytes"],
        "latest_job": job_document(newest[0]) if newest else None,
        "profiles": [{"id": p.id, "created_at": iso_time(p.created_at)} for p in records.related(profiles, row.id)],
        "plans": [
            {"id": p.id, "created_at": iso_time(p.created_at), "summary": plan_summary(p)}
            for p in records.related(plans, row.id)
        ],
    }


def plan_summary(row: Row[Any]) -> str:
    """Returns what a plan was asked for, in a few words."""
    from allocator.budget import Budget

    question = json.loads(row.question)
    engine = "" if question["engine"] is None else f", {question['engine']}"
    return Budget(**question["budget"]).describe() + engine


def job_document(row: Row[Any]) -> dict[str, Any]:
    """Returns a job."""
    options = json.loads(row.options)
    return {
        "id": row.id,
        "kind": row.kind,
        "state": row.state,
        "model_id": row.model_id,
        "plan_id": row.plan_id,
        "plan_ids": options.pop("plan_ids", None),
        "options": options,
        "attempts": row.attempts,
        "progress": json.loads(row.progress),
        "result": None if row.result is None else json.loads(row.result),
        "error": None if row.error is None else json.loads(row.error),
        "created_at": iso_time(row.created_at),
        "started_at": None if row.started_at is None else iso_time(row.started_at),
        "finished_at": None if row.finished_at is None else iso_time(row.finished_at),
    }


def artefact_document(row: Row[Any]) -> dict[str, Any]:
    """Returns a report or an export with its files."""
    facts = json.loads(row.facts)
    files = [
        {**file, "media_type": media_type_of(file["name"]), "url": f"/{row.kind}s/{row.id}/{file['name']}"}
        for file in facts.pop("files")
    ]
    shared = {"id": row.id, "job_id": row.job_id, "model_id": row.model_id, "plan_id": row.plan_id}
    return {**shared, "created_at": iso_time(row.created_at), **facts, "files": files}


def engine_document(engine: dict[str, Any]) -> dict[str, Any]:
    """Returns an engine's rules, from ``runtime.engines.describe_engines``."""
    fusions = [f"weights that match {pattern} agree" for pattern in engine["fuse"]]
    experts = f"experts differ at most by {engine['experts'].replace('_', ' ')}"
    return {
        "name": engine["name"],
        "title": f"{engine['name']}: {engine['reads']}",
        "formats": engine["menu"],
        "rules": [*engine["formats"], *fusions, experts],
        "exporter": bool(engine["exporter"]),
        "note": " ".join([*engine["notes"], f"Checked: {engine['checked']}."]),
    }


def media_type_of(name: str) -> str:
    """Returns the media type of a file by its name."""
    suffix = name[name.rfind(".") :] if "." in name else ""
    return _MEDIA_TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
