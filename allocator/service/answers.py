"""Responses: JSON with an ETag, 304 for what the asker has already, and POSTs that may be sent twice."""

import hashlib
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from sqlalchemy import delete, insert, select, update
from starlette.concurrency import run_in_threadpool

from allocator.service.database import Database, now_s
from allocator.service.problem_details import Problem
from allocator.service.schema import answers

IDEMPOTENCY_HEADER = "Idempotency-Key"
_LONGEST_KEY = 200


def json_response(document: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Returns a JSON document as a response."""
    return Response(encode(document), status_code=status, media_type="application/json", headers=headers)


def encode(document: Any) -> bytes:
    """Returns a JSON document as bytes; it must hold no infinite number."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode()


def tagged_response(request: Request, document: Any) -> Response:
    """Returns a document, as JSON values or encoded, with its ETag; 304 where the asker has it."""
    body = document if isinstance(document, bytes) else encode(document)
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if matches(request, tag):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def matches(request: Request, tag: str) -> bool:
    """Returns whether the asker has the version with this tag."""
    sent = [part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")]
    return tag in sent or "*" in sent


class IdempotentRoute(APIRoute):
    """A route whose POSTs answer a repeated Idempotency-Key with the first answer.

    The key is taken before the work, so that of two equal requests at once one is refused (409) rather than both done.
    A key whose request died with its server is free again after the time that a request may take.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns what answers a request."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            key = request.headers.get(IDEMPOTENCY_HEADER)
            if key is None or request.method != "POST":
                return await handle(request)
            database: Database = request.app.state.database
            taken = await _take(database, request, key)
            if isinstance(taken, Response):
                return taken
            try:
                response = await handle(request)
            except BaseException:
                await run_in_threadpool(_forget, database, taken)
                raise
            await run_in_threadpool(_keep, database, taken, response)
            return response

        return answer


async def _take(database: Database, request: Request, key: str) -> Response | str:
    if not 0 < len(key) <= _LONGEST_KEY:
        msg = f"an {IDEMPOTENCY_HEADER} must have 1 to {_LONGEST_KEY} characters: got {len(key)}."
        raise Problem(400, msg)
    sender = request.headers.get("authorization", "")
    place = hashlib.sha256("\0".join([key, sender, request.url.path]).encode()).hexdigest()
    body_hash = hashlib.sha256(await request.body()).hexdigest()
    stale_s = request.app.state.settings.request_s
    return await run_in_threadpool(_take_place, database, place, body_hash, stale_s)


def _take_place(database: Database, place: str, body_hash: str, stale_s: float) -> Response | str:
    with database.writing() as connection:
        stale = (answers.c.id == place) & answers.c.status.is_(None) & (answers.c.created_at < now_s() - stale_s)
        connection.execute(delete(answers).where(stale))
        row = connection.execute(select(answers).where(answers.c.id == place)).first()
        if row is None:
            connection.execute(insert(answers).values(id=place, body_hash=body_hash, created_at=now_s()))
            return place
    if row.body_hash != body_hash:
        raise Problem(422, f"an {IDEMPOTENCY_HEADER} must go with one body: got it again with another. Use a new one.")
    if row.status is None:
        raise Problem(409, f"the first request with this {IDEMPOTENCY_HEADER} must be answered: it is not yet. Wait.")
    return Response(row.body, status_code=row.status, media_type="application/json")


def _keep(database: Database, place: str, response: Response) -> None:
    body = bytes(response.body).decode()
    with database.writing() as connection:
        connection.execute(update(answers).where(answers.c.id == place).values(status=response.status_code, body=body))


def _forget(database: Database, place: str) -> None:
    with database.writing() as connection:
        connection.execute(delete(answers).where(answers.c.id == place))
