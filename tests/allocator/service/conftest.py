"""Databases of both kinds, and a service on a store that holds a tiny measured model."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from allocator.artefacts import Model
from allocator.engine_files import note_engine_files
from allocator.service.database import Database
from allocator.service.settings import ServiceSettings
from allocator.store import Store
from sensitivity.profile import SensitivityProfile
from tests.allocator.service.running_service import RunningService, run_in_thread
from tests.postgres_cluster import PostgresCluster, find_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresCluster]:
    """A PostgreSQL server that runs."""
    binaries = find_postgres()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    # Not below pytest's own directory, which only its owner may enter; and a socket's path is short.
    directory = Path(tempfile.mkdtemp(prefix="bitplan-pg-", dir="/tmp"))
    cluster = PostgresCluster(directory, binaries)
    cluster.start()
    yield cluster
    cluster.stop()
    shutil.rmtree(directory)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'service.sqlite3'}"
    cluster: PostgresCluster = request.getfixturevalue("postgres")
    return cluster.make_database()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A database with the service's tables."""
    opened = Database(database_url)
    opened.migrate()
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def service_settings(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_store: Store,
    tiny_profile: SensitivityProfile,
    tiny_llama_dir: Path,
    tiny_text: Path,
) -> ServiceSettings:
    """Settings of a service whose store holds the tiny profile, and whose models are tiny ones."""
    root = tmp_path_factory.mktemp("service_store")
    # Without what other tests timed: a budget of latency is refused until its candidates are.
    shutil.copytree(tiny_store.root, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("latencies", "timed"))
    # As a job 'measure' does.
    note_engine_files(Model(str(tiny_llama_dir)), tiny_profile, Store(root))
    models = tmp_path_factory.mktemp("service_models")
    shutil.copytree(tiny_llama_dir, models / "tiny")
    shutil.copy(tiny_text, models / "calibration.txt")
    return ServiceSettings(store_root=root, model_roots=(models,), workers=0, poll_s=0.05, request_s=120.0)


@pytest.fixture(scope="module")
def running(service_settings: ServiceSettings) -> Iterator[RunningService]:
    """The service, answering on a port of this machine, without workers."""
    with run_in_thread(service_settings) as service:
        yield service
