"""The database: SQLite beside the store or PostgreSQL by URL, brought up to date, reached in short transactions."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, Float, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

BUSY_S = 10.0
_MIGRATION_LOCK = 842_001
# SQLite's own clock has milliseconds, too few to keep the order of jobs; its processes share the machine's.
_CLOCK = "bitplan_now_s"


class Unavailable(Exception):
    """The database cannot be reached, or its disk is full: the request may be sent again later."""


class now_s(FunctionElement[float]):  # noqa: N801 (a function of SQL)
    """Seconds since 1970 by the clock of the database, which all processes share."""

    type = Float()
    inherit_cache = True


@compiles(now_s, "sqlite")
def _now_sqlite(element: Any, compiler: Any, **_: Any) -> str:
    return f"{_CLOCK}()"


@compiles(now_s, "postgresql")
def _now_postgresql(element: Any, compiler: Any, **_: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


class Database:
    """A database with the service's tables.

    Args:
        url: SQLAlchemy's URL, of SQLite or of PostgreSQL through psycopg.

    Raises:
        ValueError: If the URL is of another kind of database.
    """

    def __init__(self, url: str) -> None:
        self.url = check_url(url)
        self.engine = _make_engine(self.url)

    @property
    def is_sqlite(self) -> bool:
        """Whether it is SQLite, which has one writer at a time."""
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Gives a connection that reads one consistent state.

        Raises:
            Unavailable: If the database cannot be reached.
        """
        with _translated(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Gives a connection in a transaction, committed where the body succeeds; on SQLite the only one that writes.

        Raises:
            Unavailable: If the database cannot be reached, or cannot write.
        """
        with _translated(), self.engine.connect() as connection:
            if self.is_sqlite:
                # Taking the lock at once: a reader that becomes a writer later could not wait for it.
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
            connection.commit()

    def migrate(self) -> None:
        """Brings the tables up to date; of several processes that do so at once the others wait.

        Raises:
            Unavailable: If the database cannot be reached.
        """
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self.writing() as connection:
            if not self.is_sqlite:
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        """Closes all connections."""
        self.engine.dispose()


def check_url(url: str) -> str:
    """Returns a URL whose driver is the one that is installed.

    Raises:
        ValueError: If it is neither of SQLite nor of PostgreSQL.
    """
    parsed = make_url(url)
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        return url
    if backend in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    msg = f"a database must be SQLite or PostgreSQL: got '{backend}'. Write postgresql://user@host/name."
    raise ValueError(msg)


def _make_engine(url: str) -> Engine:
    if make_url(url).get_backend_name() != "sqlite":
        options = "-c statement_timeout=20000 -c lock_timeout=10000"
        arguments = {"connect_timeout": 5, "options": options}
        # Asked before each use, so that a database that was away is found again.
        return create_engine(url, pool_size=10, max_overflow=30, pool_pre_ping=True, connect_args=arguments)
    file = make_url(url).database
    assert file, "a file, as several processes share it"
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    # Transactions are begun by hand: the driver's own way would read before it locks.
    arguments = {"timeout": BUSY_S, "isolation_level": None, "check_same_thread": False}
    engine = create_engine(url, pool_size=10, max_overflow=30, connect_args=arguments)
    event.listen(engine, "connect", _set_pragmas)
    return engine


def _set_pragmas(connection: sqlite3.Connection, _: Any) -> None:
    connection.create_function(_CLOCK, 0, time.time)
    cursor = connection.cursor()
    # In WAL mode NORMAL survives every crash of a process; a power failure may undo the last transactions, whole.
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except PoolTimeout as error:
        msg = "the database must have a free connection: all are busy. Try again."
        raise Unavailable(msg) from error
    except DBAPIError as error:
        reason = _unavailability(error)
        if reason is None:
            raise
        msg = f"the database must be reachable and able to write: {reason}. Nothing was changed; try again later."
        raise Unavailable(msg) from error


def _unavailability(error: DBAPIError) -> str | None:
    """Returns why the database cannot answer, or None where the statement itself was wrong."""
    original = error.orig
    name = getattr(original, "sqlite_errorname", None)
    if name is not None:
        words = ("FULL", "IOERR", "CANTOPEN", "BUSY", "LOCKED", "READONLY", "NOTADB", "CORRUPT")
        found = next((word for word in words if str(name).startswith(f"SQLITE_{word}")), None)
        return None if found is None else f"{original} ({name})"
    state = getattr(original, "sqlstate", None)
    # Classes of PostgreSQL: connection, resources (disk full), operator's doing (shutdown), system, lock not available.
    if type(original).__name__ == "OperationalError" or (state or "")[:2] in ("08", "53", "57", "58", "55", "40"):
        return f"{type(original).__name__} {state or 'without a connection'}"
    return None
