"""What the service is told when it starts. Environment variables are read in `from_environment` alone."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOOPBACK = ("127.0.0.1", "::1", "localhost")
# How a server hands its settings to the workers it starts.
SETTINGS_VARIABLE = "BITPLAN_SERVICE"


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Where the service keeps things, whom it answers, and how much it takes.

    Args:
        store_root: Root of the store of measurements; the service's own files are below ``service`` in it.
        database_url: SQLAlchemy's URL of a database, or None for SQLite in the service's directory.
        model_roots: Directories below which models and texts may lie.
        host: Address to listen on.
        port: Port to listen on.
        allowed_hosts: Names in the Host header that are answered besides ``host`` and the loopback names.
        require_keys: Whether every request needs an API key, even on a loopback address.
        workers: Worker processes that the server starts and keeps alive.
        lease_s: Seconds after which a job of a worker that is not heard of is given to another.
        poll_s: Seconds between two looks into the queue, or at a job that somebody watches.
        most_attempts: Workers that one job may take down before it fails.
        most_body_bytes: Largest body of a request.
        request_s: Seconds that a request may take.
        solver_threads: Budgets solved at the same time. One, as a solve is mostly work of the interpreter, which two
            threads would only take from each other and from whoever asks for what is known.
        cached_profiles: Profiles kept in memory.
        cached_plans: Plan documents kept in memory.

    Raises:
        ValueError: If a number is not positive.
    """

    store_root: Path
    database_url: str | None = None
    model_roots: tuple[Path, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8420
    allowed_hosts: tuple[str, ...] = ()
    require_keys: bool = False
    workers: int = 1
    lease_s: float = 30.0
    poll_s: float = 0.5
    most_attempts: int = 5
    most_body_bytes: int = 256 * 1024
    request_s: float = 30.0
    solver_threads: int = 1
    cached_profiles: int = 8
    cached_plans: int = 512

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            zero_is_fine = field.name in ("workers", "port")
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0 and not zero_is_fine:
                msg = f"settings of the service must be positive: got {field.name}={value}. Correct it."
                raise ValueError(msg)

    @property
    def directory(self) -> Path:
        """Where the service keeps its database and the files that jobs make."""
        return self.store_root / "service"

    @property
    def url(self) -> str:
        """URL of the database."""
        return self.database_url or f"sqlite:///{self.directory / 'service.sqlite3'}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK

    @property
    def needs_keys(self) -> bool:
        """Whether requests need an API key."""
        return self.require_keys or not self.is_loopback

    def to_json(self) -> str:
        """Returns the settings as text, for a process of their own."""
        record = dataclasses.asdict(self)
        record["store_root"] = str(self.store_root)
        record["model_roots"] = [str(root) for root in self.model_roots]
        return json.dumps(record)


def settings_from_json(text: str) -> ServiceSettings:
    """Returns the settings in a text that ``to_json`` wrote."""
    record: dict[str, Any] = json.loads(text)
    return ServiceSettings(
        **{
            **record,
            "store_root": Path(record["store_root"]),
            "model_roots": tuple(Path(root) for root in record["model_roots"]),
            "allowed_hosts": tuple(record["allowed_hosts"]),
        }
    )
