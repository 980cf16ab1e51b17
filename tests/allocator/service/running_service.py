"""A service that answers on a port of this machine, in a thread of the test's process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import uvicorn
from fastapi import FastAPI

from allocator.service.app import make_app
from allocator.service.records import add_profile
from allocator.service.settings import ServiceSettings
from allocator.service.state import Service

_START_S = 30.0


@dataclass(frozen=True, kw_only=True, eq=False)
class RunningService:
    """A service and how to reach it.

    Args:
        url: Where it answers.
        app: The application inside of the guards.
        client: Sends requests to it.
    """

    url: str
    app: FastAPI
    client: httpx2.Client

    @property
    def service(self) -> Service:
        """Its parts."""
        found: Service = self.app.state.service
        return found

    def get(self, path: str, **options: Any) -> httpx2.Response:
        """Returns the answer to a GET."""
        return self.client.get(path, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx2.Response:
        """Returns the answer to a POST of a JSON body."""
        return self.client.post(path, json=body, **options)

    def add_model(self) -> str:
        """Returns the id of the tiny model."""
        return str(self.post("/models", {"path": "tiny"}).json()["id"])

    def add_profile(self, profile_id: str) -> str:
        """Makes the tiny model's profile known, as a measurement would, and returns its id."""
        model_id = self.add_model()
        with self.service.database.writing() as connection:
            add_profile(connection, profile_id, model_id)
        return profile_id


@contextmanager
def run_in_thread(settings: ServiceSettings) -> Iterator[RunningService]:
    """Gives a service that runs until the body ends."""
    guarded, app = make_app(settings)
    config = uvicorn.Config(guarded, host="127.0.0.1", port=0, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + _START_S
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server must start"
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with httpx2.Client(base_url=url, timeout=30.0) as client:
        yield RunningService(url=url, app=app, client=client)
    server.should_exit = True
    thread.join()
