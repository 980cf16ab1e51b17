"""What stands before the routes: host and origin, sizes and times, and the headers of every response.

The Host header must be a name of this server: a page elsewhere whose name was pointed at this machine (DNS rebinding)
sends its own. A foreign Origin is refused, as a browser sends it with what a page elsewhere asks for.
"""

import asyncio
import logging
import time
from collections.abc import MutableMapping
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from allocator.service.metrics import Metrics
from allocator.service.problem_details import PROBLEM_TYPE, Problem
from allocator.service.settings import LOOPBACK, ServiceSettings

log = logging.getLogger("bitplan.access")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self'; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
# Reports carry their charts' library and data in the page itself; in a sandbox they have no origin to act from.
REPORT_POLICY = (
    "sandbox allow-scripts allow-downloads; default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'unsafe-inline'; img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'self'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "SAMEORIGIN",
}
# Streams and files last as long as they last.
_UNTIMED = ("/events", "/archive")
_UNTIMED_BELOW = ("/exports/", "/reports/")


class Guards:
    """The outermost application.

    Args:
        app: What answers.
        settings: The service's settings.
        metrics: What is counted.
    """

    def __init__(self, app: ASGIApp, settings: ServiceSettings, metrics: Metrics) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self.hosts = {host.lower() for host in (*LOOPBACK, settings.host, *settings.allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, answered = time.perf_counter(), _Answered(send, _policy_of(scope["path"]))
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check_sender(headers)
            body = await self._read_body(headers, receive)
            await self._answer(scope, body, receive, answered)
        except Problem as problem:
            await answered.problem(problem, scope["path"])
        finally:
            self._note(scope, answered.status, time.perf_counter() - started)

    def _check_sender(self, headers: MutableMapping[str, str]) -> None:
        if _host_name(headers.get("host", "")) not in self.hosts:
            detail = (
                f"the Host header must name this server: got '{headers.get('host', '')[:100]}'. Start it with "
                "--allowed-host if this is its name."
            )
            raise Problem(421, detail, title="Misdirected request")
        origin = headers.get("origin")
        if origin is not None and _host_name(urlsplit(origin).netloc if "//" in origin else origin) not in self.hosts:
            raise Problem(403, f"requests of a page must come from this server's own: got Origin '{origin[:100]}'.")

    async def _read_body(self, headers: MutableMapping[str, str], receive: Receive) -> bytes:
        most = self.settings.most_body_bytes
        too_large = Problem(413, f"a body must have at most {most} bytes: got more. Send less.")
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > most:
            raise too_large
        parts, count = [], 0
        try:
            async with asyncio.timeout(self.settings.request_s):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return b""
                    parts.append(message.get("body", b""))
                    count += len(parts[-1])
                    if count > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            raise Problem(408, f"a body must arrive within {self.settings.request_s:g} s: it did not.") from error

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, answered: "_Answered") -> None:
        sent = False

        async def receive_again() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        path = str(scope["path"])
        untimed = path.endswith(_UNTIMED) or path.startswith(_UNTIMED_BELOW)
        try:
            async with asyncio.timeout(None if untimed else self.settings.request_s):
                await self.app(scope, receive_again, answered)
        except TimeoutError as error:
            detail = f"a request must be answered within {self.settings.request_s:g} s: it was not. Ask for less."
            raise Problem(504, detail) from error

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "other")
        self.metrics.note_request(str(scope["method"]), path, status, seconds)
        log.info(
            "request",
            extra={"method": scope["method"], "path": scope["path"], "status": status, "ms": round(seconds * 1e3, 2)},
        )


class _Answered:
    """A ``send`` that adds the headers of every response, and remembers its status."""

    def __init__(self, send: Send, policy: str) -> None:
        self.send = send
        self.status = 0
        self.headers = [(n.lower().encode(), v.encode()) for n, v in HEADERS.items()]
        self.headers.append((b"content-security-policy", policy.encode()))

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", []), *self.headers]}
        await self.send(message)

    async def problem(self, problem: Problem, path: str) -> None:
        """Answers with a problem, where nothing was answered yet."""
        if self.status:
            return
        body = problem.to_bytes(path)
        headers = {"content-type": PROBLEM_TYPE, "content-length": str(len(body)), **problem.headers}
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": problem.status, "headers": encoded})
        await self({"type": "http.response.body", "body": body})


def _policy_of(path: str) -> str:
    return REPORT_POLICY if path.startswith("/reports/") else POLICY


def _host_name(netloc: str) -> str:
    """Returns the name or address of a Host header, without its port and brackets."""
    name = netloc.rpartition("@")[2].strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0] if name.count(":") == 1 else name
