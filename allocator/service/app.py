"""The application: routes, guards and the life of a server."""

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter
from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from allocator.service.description import describe
from allocator.service.guards import Guards
from allocator.service.problem_details import add_problem_handlers
from allocator.service.routes import artefacts, jobs, models, operations, plans
from allocator.service.settings import ServiceSettings
from allocator.service.state import Service, make_service

ROUTERS = (models.router, jobs.router, plans.router, artefacts.router, operations.router)
PAGE = Path(__file__).parent / "page"


def make_app(settings: ServiceSettings) -> tuple[ASGIApp, FastAPI]:
    """Returns what a server runs: the guarded application, and the application inside.

    Args:
        settings: The service's settings.
    """
    service = make_service(settings)
    app = FastAPI(
        title="bitplan",
        version=version("bitplan"),
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        strict_content_type=True,
    )
    app.state.service, app.state.settings, app.state.database = service, settings, service.database
    add_problem_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    _add_page(app)
    inner: Any = app
    inner.openapi = lambda: describe(app)
    return Guards(app, settings, service.metrics), app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    app.state.solver_limiter = CapacityLimiter(service.settings.solver_threads)
    await run_in_threadpool(service.database.migrate)
    await run_in_threadpool(service.supervisor.start)
    # What was imported stays for good: to look through it again and again for garbage holds up every request.
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        await run_in_threadpool(service.supervisor.stop)
        service.database.close()


def _add_page(app: FastAPI) -> None:
    if not (PAGE / "index.html").is_file():
        return

    @app.get("/", include_in_schema=False)
    def read_page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/assets", StaticFiles(directory=PAGE / "assets"), name="assets")
