"""What jobs wrote: reports and exports, their files, and an archive of them."""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from sqlalchemy import Row

from allocator.service.access import read_scope
from allocator.service.answers import matches, tagged_response
from allocator.service.problem_details import raise_not_found
from allocator.service.replies import ArtefactReply
from allocator.service.resource_documents import artefact_document, media_type_of
from allocator.service.schema import artefacts
from allocator.service.state import Service, ServiceOf

router = APIRouter(tags=["reports and exports"])
_BINARY = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
_CHUNK_BYTES = 1 << 20


@router.get(
    "/reports/{report_id}", dependencies=[read_scope], responses={200: {"model": ArtefactReply}}, summary="A report"
)
def read_report(report_id: str, request: Request, service: ServiceOf) -> Response:
    """Returns the files of a report."""
    return tagged_response(request, artefact_document(_find(service, "report", report_id)))


@router.get(
    "/exports/{export_id}", dependencies=[read_scope], responses={200: {"model": ArtefactReply}}, summary="An export"
)
def read_export(export_id: str, request: Request, service: ServiceOf) -> Response:
    """Returns the files of an export or a packed model, and the command that runs it."""
    return tagged_response(request, artefact_document(_find(service, "export", export_id)))


@router.get(
    "/exports/{export_id}/archive",
    dependencies=[read_scope],
    summary="An export as one file",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/x-tar": {"schema": {"type": "string", "format": "binary"}}}}},
)
def read_archive(export_id: str, service: ServiceOf) -> StreamingResponse:
    """Sends all files as a tar archive, which is made on the way."""
    row = _find(service, "export", export_id)
    names = [file["name"] for file in json.loads(row.facts)["files"]]
    headers = {"Content-Disposition": f'attachment; filename="{row.id}.tar"'}
    return StreamingResponse(_archive(_place(service, row), names), media_type="application/x-tar", headers=headers)


@router.get(
    "/reports/{report_id}/{file:path}",
    dependencies=[read_scope],
    summary="A file of a report",
    response_class=FileResponse,
    responses={200: _BINARY},
)
def read_report_file(report_id: str, file: str, request: Request, service: ServiceOf) -> Response:
    """Sends a file of a report; pages are sent with a policy that gives them no origin."""
    return _file_response(request, service, _find(service, "report", report_id), file)


@router.get(
    "/exports/{export_id}/{file:path}",
    dependencies=[read_scope],
    summary="A file of an export",
    response_class=FileResponse,
    responses={200: _BINARY},
)
def read_export_file(export_id: str, file: str, request: Request, service: ServiceOf) -> Response:
    """Sends a file of an export."""
    return _file_response(request, service, _find(service, "export", export_id), file)


def _find(service: Service, kind: str, key: str) -> Row[Any]:
    row = service.records.find(artefacts, key)
    if row is None or row.kind != kind:
        raise_not_found(f"the {kind}", key)
    return row


def _place(service: Service, row: Row[Any]) -> Path:
    return service.settings.directory / "artefacts" / str(row.id)


def _file_response(request: Request, service: Service, row: Row[Any], name: str) -> Response:
    # Only names that the job wrote down: no path is made of what was sent.
    if name not in {file["name"] for file in json.loads(row.facts)["files"]}:
        raise_not_found(f"a file of the {row.kind}", name)
    tag = f'"{hashlib.sha256(f"{row.id}/{name}".encode()).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "private, max-age=31536000, immutable"}
    if matches(request, tag):
        return Response(status_code=304, headers=headers)
    path = _place(service, row) / name
    if not path.is_file():
        raise_not_found(f"a file of the {row.kind}", name)
    media_type = media_type_of(name)
    if row.kind == "export" or media_type != "text/html":
        headers["Content-Disposition"] = f'attachment; filename="{Path(name).name}"'
    return FileResponse(path, media_type=media_type, headers=headers)


def _archive(place: Path, names: list[str]) -> Iterator[bytes]:
    """Yields a tar archive piece by piece, so that a model larger than memory passes through."""
    for name in names:
        entry = tarfile.TarInfo(name)
        entry.size = (place / name).stat().st_size
        yield entry.tobuf(format=tarfile.PAX_FORMAT)
        with (place / name).open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
        yield b"\0" * (-entry.size % tarfile.BLOCKSIZE)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)
