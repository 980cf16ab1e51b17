"""``bitplan serve``: the server's process."""

import logging
import sys

import uvicorn

from allocator.service.app import make_app
from allocator.service.database import Database
from allocator.service.logs import start_logging
from allocator.service.settings import ServiceSettings

SWITCH_S = 0.001
log = logging.getLogger("bitplan.server")


def serve(settings: ServiceSettings) -> None:
    """Answers requests until it is told to stop.

    Args:
        settings: The service's settings.

    Raises:
        ValueError: If other machines can reach it and there is no key that opens it.
    """
    start_logging()
    # Requests that need no solve wait for the interpreter no longer than this while a solve has it.
    sys.setswitchinterval(SWITCH_S)
    # Before anybody is answered: a database that cannot be used is said at once.
    database = Database(settings.url)
    database.migrate()
    check_keys(settings, database)
    database.close()
    app, _ = make_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=True,
        timeout_keep_alive=30,
        limit_concurrency=1000,
        h11_max_incomplete_event_size=64 * 1024,
        timeout_graceful_shutdown=10,
    )
    log.info("server starts", extra={"host": settings.host, "port": settings.port, "keys": settings.needs_keys})
    uvicorn.Server(config).run()


def check_keys(settings: ServiceSettings, database: Database) -> None:
    """Checks that a server which other machines can reach has a key.

    Raises:
        ValueError: If it has none.
    """
    from allocator.service.api_keys import ApiKeys

    keys, _ = ApiKeys(database).list_page(limit=200)
    if not settings.is_loopback and not any(key.is_valid for key in keys):
        msg = (
            f"a server that other machines can reach must have API keys: got host='{settings.host}' and no valid key. "
            "Make one with 'bitplan keys add NAME --scope admin', or listen on 127.0.0.1."
        )
        raise ValueError(msg)
