"""Clients of a running service: the verbs' results, both kinds of client, and what they do when nobody answers."""

import asyncio
import dataclasses
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import allocator
from allocator.budget import Budget, InfeasibleBudget
from allocator.cli import run
from allocator.client import AsyncClient, Client
from allocator.client_requests import ServiceError
from allocator.client_verbs import RemoteProfile, options_of, raise_problem
from allocator.measuring import MeasureRequest
from allocator.plan_files import load_plan
from allocator.service.settings import ServiceSettings
from allocator.service.worker import Worker
from runtime.packed_model import load_packed
from sensitivity.measure_config import MeasureConfig
from tests.allocator.service.conftest import service_settings  # noqa: F401 (a fixture)
from tests.allocator.service.running_service import run_in_thread
from tests.tiny_measurements import CONFIG, FLAGS, FORMATS

REQUEST = MeasureRequest(calibration="calibration.txt", formats=FORMATS, config=CONFIG)
BUDGET = Budget(bits_per_weight=8.6)


@pytest.fixture(scope="module")
def url(
    service_settings: ServiceSettings,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """A service with a worker."""
    settings = dataclasses.replace(service_settings, store_root=tmp_path_factory.mktemp("client_store"))
    over = threading.Event()
    with run_in_thread(settings) as running:
        worker = Worker(settings)

        def work() -> None:
            while not over.is_set():
                if not worker.run_once():
                    over.wait(0.05)

        thread = threading.Thread(target=work)
        thread.start()
        yield running.url
        over.set()
        thread.join()


def test_the_verbs_give_what_they_give_locally(url: str, tiny_profile: Any, tmp_path: Path) -> None:
    with Client(url) as client:
        profile = client.measure("tiny", request=REQUEST)
        plan = client.plan(profile, BUDGET)
        assert client.plan("tiny", BUDGET) == plan
        local = allocator.plan(tiny_profile, BUDGET, verify=False)
        assert plan.document["choice"] == {unit.unit: unit.format for unit in local.units}
        points = client.frontier("tiny", points=4)
        expected = allocator.frontier(tiny_profile, points=4)
        assert [p["use"] for p in points] == [p["memory_bytes"] for p in expected]
        read = client.frontier(profile, points=3, resource="read_bytes", engine="mlx-lm")
        expected = allocator.frontier(tiny_profile, points=3, resource="read_bytes", engine="mlx-lm")
        assert [p["use"] for p in read] == [p["read_bytes"] for p in expected]
        evaluations = client.evaluate(plan)
        assert [e.kind for e in evaluations][0] == "reference"
        assert sum(e.shipped for e in evaluations) == 1
        assert load_packed(client.apply(plan, tmp_path / "packed"))[0] is not None
        page = client.report(plan, tmp_path / "report", parquet=True)
        assert page.is_file() and list(page.parent.glob("*.csv")) and list(page.parent.glob("*.parquet"))
        legal = client.plan(profile, Budget(bits_per_weight=9), engine="mlx-lm")
        command = client.export(legal, "mlx-lm", tmp_path / "mlx")
        assert command == f"mlx_lm.generate --model {tmp_path / 'mlx'} --prompt 'The'"
        assert list((tmp_path / "mlx").glob("*.safetensors"))
        assert not list(tmp_path.rglob(".archive*"))


def test_both_kinds_of_client_are_answered_alike(url: str, tmp_path: Path) -> None:
    async def ask() -> Any:
        async with AsyncClient(url) as client:
            profile = await client.measure("tiny", request=REQUEST)
            plans = await asyncio.gather(*(client.plan(profile, Budget(bits_per_weight=5 + i / 4)) for i in range(8)))
            packed = await client.apply(plans[-1], tmp_path / "packed")
            assert len(await client.frontier(profile, points=3)) == 3
            await client.compare(plans[0], plans[-1], tmp_path / "comparison")
            return profile, plans, packed, await client.plan_file(plans[0])

    profile, plans, packed, record = asyncio.run(ask())
    with Client(url) as client:
        assert client.measure("tiny", request=REQUEST) == profile
        assert [client.plan(profile, Budget(bits_per_weight=5 + i / 4)) for i in range(8)] == plans
    assert load_packed(packed)[0] is not None
    assert record["weights"]
    assert "bits per weight" in (tmp_path / "comparison" / "comparison.html").read_text(encoding="utf-8")


def test_what_the_service_refuses_is_raised(url: str, tmp_path: Path) -> None:
    with Client(url) as client:
        profile = client.measure("tiny", request=REQUEST)
        with pytest.raises(InfeasibleBudget, match="a budget must be reachable") as infeasible:
            client.plan(profile, Budget(bits_per_weight=1))
        assert infeasible.value.least_use["memory_bytes"] > 0
        with pytest.raises(ServiceError, match="metric must be one the profile holds") as refused:
            client.plan(profile, BUDGET, metric="guess")
        assert refused.value.status == 400
        with pytest.raises(ServiceError, match="a path must name something below the directories"):
            client.measure("/etc")
        with pytest.raises(ServiceError, match="a plan must keep the rules of the engine"):
            client.export(client.plan(profile, BUDGET), "tensorrt-llm", tmp_path / "never")
        assert not list(tmp_path.iterdir())
        with pytest.raises(ValueError, match="a service takes limits on latency_us alone"):
            client.plan(profile, Budget(bits_per_weight=5, limits={"read_bytes": 1e9}))


def test_the_command_takes_a_server(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    remote = ["--server", url]
    assert run([*remote, "measure", "tiny", "--calibration", "calibration.txt", *FLAGS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["units"] > 0
    assert run([*remote, "plan", "tiny", "--bits-per-weight", "8.6", "--out", str(out), "--json"]) == 0
    plan_id = json.loads(capsys.readouterr().out)["id"]
    assert load_plan(out).bits_per_weight <= 8.6
    assert run([*remote, "evaluate", "--plan", plan_id]) == 0
    assert run([*remote, "frontier", "tiny", "--points", "3", "--resource", "read_bytes"]) == 0
    capsys.readouterr()
    assert run([*remote, "plan", "tiny", "--bits-per-weight", "6", "--json"]) == 0
    other_id = json.loads(capsys.readouterr().out)["id"]
    assert run([*remote, "report", "--compare", plan_id, other_id, "--out", str(tmp_path / "comparison")]) == 0
    assert run([*remote, "report", "--out", str(tmp_path / "none")]) == 2
    assert run([*remote, "report", "--compare", plan_id, other_id, "--pdf", "--out", str(tmp_path / "none")]) == 2
    assert run([*remote, "apply", "--plan", plan_id, "--out", str(tmp_path / "packed")]) == 0
    assert run([*remote, "report", "--plan", plan_id, "--out", str(tmp_path / "report")]) == 0
    assert run([*remote, "plan", "tiny", "--bits-per-weight", "1"]) == 3
    assert run([*remote, "export", "--plan", plan_id, "--engine", "hqq", "--out", str(tmp_path / "x")]) == 1
    capsys.readouterr()
    assert run([*remote, "demo"]) == 2
    assert "a command with --server must be among measure, plan, frontier" in capsys.readouterr().err


class Flaky(BaseHTTPRequestHandler):
    """Answers 503 until it was asked often enough, and notes the keys of what it was sent."""

    failures = 2
    keys: list[str | None] = []

    def do_POST(self) -> None:
        self.keys.append(self.headers.get("Idempotency-Key"))
        self.rfile.read(int(self.headers["Content-Length"]))
        status = 503 if len(self.keys) <= self.failures else 200
        body = b'{"id": "p", "model_id": "m", "detail": "later"}'
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Is silent."""


@pytest.fixture
def flaky() -> Iterator[tuple[str, type[Flaky]]]:
    handler = type("Handler", (Flaky,), {"keys": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("waits", [True, False], ids=["Client", "AsyncClient"])
def test_a_request_is_sent_again_as_the_same_one(flaky: tuple[str, type[Flaky]], waits: bool) -> None:
    url, handler = flaky
    profile = RemoteProfile(id="f", model_id="m", document={})
    if waits:
        with Client(url) as client:
            assert client.plan(profile, BUDGET).id == "p"
    else:

        async def ask() -> Any:
            async with AsyncClient(url) as client:
                return await client.plan(profile, BUDGET)

        assert asyncio.run(ask()).id == "p"
    assert len(handler.keys) == 3 and len(set(handler.keys)) == 1 and handler.keys[0]


def test_a_service_that_stays_away_is_given_up(flaky: tuple[str, type[Flaky]]) -> None:
    url, handler = flaky
    handler.failures = 99
    with Client(url, repeats=1) as client, pytest.raises(ServiceError, match="later"):
        client.measure("tiny")
    assert len(handler.keys) == 2
    nobody = "http://127.0.0.1:1"
    with Client(nobody, repeats=1) as client, pytest.raises(ServiceError, match="the service must answer: got none"):
        client.measure("tiny")


def test_an_answer_that_is_no_document_is_named_so() -> None:
    with pytest.raises(ServiceError, match="the service must answer with its documents: got status 502"):
        raise_problem(502, b"<html>")


def test_only_what_differs_from_the_defaults_is_sent() -> None:
    assert options_of(MeasureRequest()) == {}
    request = MeasureRequest(formats=("int4_g64", "bf16"), pins={"head": "bf16"}, config=MeasureConfig(seed=3))
    assert options_of(request) == {"formats": ["int4_g64", "bf16"], "pins": {"head": "bf16"}, "seed": 3}
