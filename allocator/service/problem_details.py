"""Errors as RFC 9457 problem details: what is answered for every exception that is not a defect, and for those."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any, NoReturn

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from allocator.budget import InfeasibleBudget
from allocator.json_values import jsonable
from allocator.service.allowed_paths import ForbiddenPath
from allocator.service.database import Unavailable
from allocator.service.priced_profiles import UnknownProfile

PROBLEM_TYPE = "application/problem+json"
log = logging.getLogger("bitplan.server")


class Problem(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        detail: What must hold, what was got, what to do.
        title: The kind of problem; None for the status in words.
        members: Further members of the document.
        headers: Headers of the response.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        title: str | None = None,
        members: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.title = title or HTTPStatus(status).phrase
        self.members = dict(members or {})
        self.headers = dict(headers or {})

    def to_bytes(self, instance: str) -> bytes:
        """Returns the document.

        Args:
            instance: Path of the request.
        """
        document = {
            "type": "about:blank",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "instance": instance,
            **self.members,
        }
        return json.dumps(jsonable(document)).encode()


def raise_not_found(what: str, key: str) -> NoReturn:
    """Raises the problem of something that is not there."""
    raise Problem(404, f"{what} must be known: got '{key[:80]}', which is not.")


@contextmanager
def refused() -> Iterator[None]:
    """Makes a ``ValueError`` of the body, which says what is wrong with the request, an answer of 400."""
    try:
        yield
    except ValueError as error:
        raise Problem(400, str(error)) from error


def _infeasible(error: InfeasibleBudget) -> Problem:
    least = {"bytes" if name == "memory_bytes" else name: value for name, value in error.least_use.items()}
    return Problem(422, str(error), title="Infeasible budget", members={"least_reachable": least})


def _invalid(error: RequestValidationError) -> Problem:
    found = [
        {"pointer": "/" + "/".join(str(part) for part in e["loc"]), "detail": str(e["msg"])} for e in error.errors()
    ]
    words = "; ".join(f"{e['pointer']}: {e['detail']}" for e in found)[:2000]
    return Problem(400, f"a request must have the fields of its description: {words}.", members={"errors": found})


def _unavailable(error: Unavailable) -> Problem:
    return Problem(503, str(error), headers={"Retry-After": "2"})


def _http(error: HTTPException) -> Problem:
    return Problem(error.status_code, str(error.detail), headers=error.headers)


# Exception -> the problem it is.
PROBLEMS: dict[type[Exception], Callable[[Any], Problem]] = {
    Problem: lambda error: error,
    InfeasibleBudget: _infeasible,
    RequestValidationError: _invalid,
    Unavailable: _unavailable,
    HTTPException: _http,
    ForbiddenPath: lambda error: Problem(403, str(error)),
    UnknownProfile: lambda error: Problem(404, str(error)),
}


def add_problem_handlers(app: FastAPI) -> None:
    """Makes an app answer every exception with a problem document."""
    for kind in PROBLEMS:
        app.add_exception_handler(kind, _handle)
    app.add_exception_handler(Exception, _handle_defect)


def problem_of(error: Exception) -> Problem | None:
    """Returns the problem that an exception is, or None for a defect of the program."""
    return next((make(error) for kind, make in PROBLEMS.items() if isinstance(error, kind)), None)


async def _handle(request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    assert problem is not None
    return problem_response(problem, request.url.path)


async def _handle_defect(request: Request, error: Exception) -> Response:
    log.error("defect", extra={"path": request.url.path}, exc_info=error)
    detail = "the server met a defect of its own; its log has the details. Report it with the time of this request."
    return problem_response(Problem(500, detail), request.url.path)


def problem_response(problem: Problem, instance: str) -> Response:
    """Returns a problem as a response."""
    return Response(
        problem.to_bytes(instance), status_code=problem.status, media_type=PROBLEM_TYPE, headers=problem.headers
    )
