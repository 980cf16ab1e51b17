"""The steps that a client's verbs are made of: a step is yielded, who runs it sends back what came of it."""

import uuid
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class ServiceError(ValueError):
    """The service refused, or a job of it failed.

    Args:
        message: What it said.
        status: HTTP status.
        problem: The problem document.
    """

    def __init__(self, message: str, *, status: int, problem: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.status = status
        self.problem = dict(problem)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request with a JSON answer.

    Args:
        method: HTTP method.
        path: Path and query.
        body: JSON body, or None.
        key: Makes a POST that is sent twice count once.
    """

    method: str
    path: str
    body: Any = None
    key: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """A file to be fetched; what comes of it is nothing.

    Args:
        path: Path on the server.
        out: File to write.
    """

    path: str
    out: Path


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Time to pass."""

    seconds: float


Steps = Generator[Call | Fetch | Wait, Any, Any]
