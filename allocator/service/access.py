"""Who may do what: the key in the Authorization header, and the scope that a route asks for."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from allocator.service.api_keys import ADMIN, PLAN, READ
from allocator.service.problem_details import Problem
from allocator.service.state import service_of

_bearer = HTTPBearer(auto_error=False, description="A key of 'bitplan keys add'; a server on loopback asks for none.")
Sent = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def _require(scope: str) -> Callable[[Request, Sent], Awaitable[None]]:
    # Asynchronous, as where no keys are asked for a thread for each request would cost more than its answer.
    async def check(request: Request, sent: Sent) -> None:
        service = service_of(request)
        if not service.settings.needs_keys:
            return
        key = None if sent is None else await run_in_threadpool(service.keys.check, sent.credentials)
        if key is None:
            detail = "a request must carry a valid key: got none that opens this. Send 'Authorization: Bearer KEY'."
            raise Problem(401, detail, headers={"WWW-Authenticate": 'Bearer realm="bitplan"'})
        if not key.allows(scope):
            raise Problem(403, f"the key's scope must include '{scope}': got a key of scope '{key.scope}'.")

    return check


read_scope = Depends(_require(READ))
plan_scope = Depends(_require(PLAN))
admin_scope = Depends(_require(ADMIN))
