"""Server and workers killed at random moments under load: a short run of what ``benchmarks`` does fifty times."""

import dataclasses
import shutil
import socket
from pathlib import Path

import pytest

from allocator.service.settings import ServiceSettings
from tests.allocator.service.faults import TormentedService, find_outcome, torment


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_nothing_is_lost_or_done_twice_when_processes_are_killed(
    service_settings: ServiceSettings, database_url: str, tmp_path: Path
) -> None:
    settings = dataclasses.replace(
        service_settings,
        store_root=tmp_path / "store",
        database_url=database_url,
        port=free_port(),
        workers=1,
        lease_s=2.0,
        most_attempts=50,
    )
    service = TormentedService(settings, tmp_path / "log")
    tally = torment(service, kills=2, seed=0, longest_s=6.0, waiting=1)
    found = find_outcome(settings, tally)
    assert found.jobs >= 1
    assert (found.lost, found.twice, found.partial) == (0, 0, 0)
    shutil.rmtree(settings.store_root)
