"""The commands of ``bitplan`` that run the service: the server, workers of it, and its keys."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from allocator.cli_options import json_option, parse, printed
from allocator.cli_output import render, table

if TYPE_CHECKING:
    from allocator.service.settings import ServiceSettings

database_option = click.option(
    "--database", help="postgresql://… or sqlite:///…; default: SQLite below the store.", envvar="BITPLAN_DATABASE"
)


def make_settings(**options: Any) -> "ServiceSettings":
    from allocator.service.settings import ServiceSettings
    from allocator.store import Store

    database = options.pop("database")
    return ServiceSettings(store_root=Store().root, database_url=database, **options)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Any other than loopback needs API keys.")
@click.option("--port", type=click.IntRange(0, 65535), default=8420, show_default=True)
@click.option(
    "--model-root",
    "model_roots",
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    multiple=True,
    help="Directory below which models and texts may lie; repeatable. Default: the current one.",
)
@click.option("--allowed-host", "allowed_hosts", multiple=True, help="Further name of this server; repeatable.")
@click.option("--require-keys", is_flag=True, help="Ask for API keys on loopback too.")
@click.option("--workers", type=click.IntRange(0), default=1, show_default=True, help="Processes that do the jobs.")
@database_option
def serve(model_roots: tuple[Path, ...], **options: Any) -> None:
    """Serve models, plans and the page that explores them."""
    from allocator.service.serving import serve as run

    run(parse(lambda: make_settings(model_roots=model_roots or (Path.cwd(),), **options)))


@click.command()
@click.option(
    "--model-root",
    "model_roots",
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    multiple=True,
    help="As the server's.",
)
@database_option
def worker(model_roots: tuple[Path, ...], **options: Any) -> None:
    """Do the jobs of a server, in this process. The store must be the server's."""
    from allocator.service.logs import start_logging
    from allocator.service.worker import run_worker

    start_logging()
    run_worker(parse(lambda: make_settings(model_roots=model_roots or (Path.cwd(),), **options)))


@click.group()
def keys() -> None:
    """Make, list, replace and revoke the API keys of the service."""


@keys.command("add")
@click.argument("name")
@click.option("--scope", type=click.Choice(["read", "plan", "admin"]), default="plan", show_default=True)
@click.option("--days", type=click.IntRange(1), help="Days until it ends; default: never.")
@database_option
@json_option
@printed
def add_key(name: str, scope: str, days: int | None, database: str | None, as_json: bool) -> str:
    """Make a key for NAME and print it, once: it is kept as a hash."""
    import time

    expires_at = None if days is None else time.time() + 86_400.0 * days
    key_id, key = _open_keys(database).add(name, scope, expires_at=expires_at)
    return render({"id": key_id, "key": key, "scope": scope}, as_json, lambda document: document["key"])


@keys.command("list")
@database_option
@json_option
@printed
def list_keys(database: str | None, as_json: bool) -> str:
    """List the keys, newest first, without what is secret in them."""
    found, _ = _open_keys(database).list_page(limit=200)
    rows = [{"id": k.key_id, "name": k.name, "scope": k.scope, "valid": k.is_valid} for k in found]
    return render({"keys": rows}, as_json, lambda document: table(document["keys"]))


@keys.command("rotate")
@click.argument("key_id")
@click.option("--overlap-hours", type=click.FloatRange(0), default=24.0, show_default=True, help="The old one's rest.")
@database_option
@json_option
@printed
def rotate_key(key_id: str, overlap_hours: float, database: str | None, as_json: bool) -> str:
    """Replace a key by a new one of the same scope; the old one works for a while yet."""
    new_id, key = _open_keys(database).rotate(key_id, overlap_s=3600.0 * overlap_hours)
    return render({"id": new_id, "key": key}, as_json, lambda document: document["key"])


@keys.command("revoke")
@click.argument("key_id")
@database_option
@printed
def revoke_key(key_id: str, database: str | None) -> str:
    """End a key now."""
    _open_keys(database).revoke(key_id)
    return f"{key_id} opens nothing any more."


def _open_keys(database: str | None) -> Any:
    from allocator.service.api_keys import ApiKeys
    from allocator.service.database import Database

    opened = Database(make_settings(database=database).url)
    opened.migrate()
    return ApiKeys(opened)


SERVICE_COMMANDS = (serve, worker, keys)
