"""Jobs from request to artefact, done by workers: progress, results, files, cancelling, repeating."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from allocator.service.settings import SETTINGS_VARIABLE, ServiceSettings
from allocator.service.worker import Worker, describe_problem
from allocator.store import Store
from reports.browser import BROWSERS
from runtime.packed_model import load_packed
from sensitivity.profile import SensitivityProfile
from tests.allocator.service.running_service import RunningService, run_in_thread
from tests.tiny_measurements import CONFIG, FORMATS

MEASURE = {"calibration": "calibration.txt", "formats": list(FORMATS), **dataclasses.asdict(CONFIG)}
PATIENCE_S = 120.0  # more than a process needs on a busy machine


@pytest.fixture(scope="module")
def settings(service_settings: ServiceSettings, tmp_path_factory: pytest.TempPathFactory) -> ServiceSettings:
    return dataclasses.replace(service_settings, store_root=tmp_path_factory.mktemp("jobs_store"), poll_s=0.02)


@pytest.fixture(scope="module")
def jobs_service(settings: ServiceSettings) -> Iterator[RunningService]:
    with run_in_thread(settings) as running:
        yield running


@pytest.fixture(scope="module")
def worker(settings: ServiceSettings, jobs_service: RunningService) -> Worker:
    return Worker(settings)


@pytest.fixture(scope="module")
def measured(jobs_service: RunningService, worker: Worker) -> dict[str, Any]:
    """The job that measured the tiny model."""
    model_id = jobs_service.add_model()
    submitted = jobs_service.post("/jobs", {"kind": "measure", "model_id": model_id, "options": MEASURE})
    assert submitted.status_code == 202, submitted.text
    return finish(jobs_service, worker, submitted.json()["id"])


@pytest.fixture(scope="module")
def plan(jobs_service: RunningService, measured: dict[str, Any]) -> dict[str, Any]:
    body = {"profile_id": measured["result"]["profile_id"], "budget": {"bits_per_weight": 8.6}}
    found: dict[str, Any] = jobs_service.post("/plans", body).json()
    return found


def finish(running: RunningService, worker: Worker, job_id: str) -> dict[str, Any]:
    while worker.run_once():
        pass
    found: dict[str, Any] = running.get(f"/jobs/{job_id}").json()
    return found


def do(running: RunningService, worker: Worker, kind: str, plan: dict[str, Any], **options: Any) -> dict[str, Any]:
    submitted = running.post("/jobs", {"kind": kind, "plan_id": plan["id"], "options": options})
    assert submitted.status_code in (200, 202), submitted.text
    job = finish(running, worker, submitted.json()["id"])
    assert job["state"] == "succeeded", job["error"]
    return job


def test_a_measurement_is_that_of_the_verb(
    measured: dict[str, Any], tiny_profile: SensitivityProfile, settings: ServiceSettings
) -> None:
    assert (measured["state"], measured["attempts"], measured["error"]) == ("succeeded", 1, None)
    found = Store(settings.store_root).find_profile(measured["result"]["profile_id"])
    assert found is not None
    # The calibration text is a copy, so the fingerprints of both profiles differ in nothing but its name at most.
    for name, table in tiny_profile.losses.items():
        assert (found.losses[name].loss == table.loss).all()
    assert measured["progress"]["done"] == measured["progress"]["total"]


def test_the_same_request_shares_the_measurement(jobs_service: RunningService, measured: dict[str, Any]) -> None:
    body = {"kind": "measure", "model_id": measured["model_id"], "options": MEASURE}
    again = jobs_service.post("/jobs", body)
    assert (again.status_code, again.json()) == (200, measured)
    body["options"] = {**MEASURE, "seed": 1}
    other = jobs_service.post("/jobs", body)
    assert other.status_code == 202
    assert jobs_service.client.delete(f"/jobs/{other.json()['id']}").json()["state"] == "cancelled"


def test_the_model_lists_what_was_made_of_it(
    jobs_service: RunningService, measured: dict[str, Any], plan: dict[str, Any]
) -> None:
    model = jobs_service.get(f"/models/{measured['model_id']}").json()
    assert [profile["id"] for profile in model["profiles"]] == [measured["result"]["profile_id"]]
    assert plan["id"] in [made["id"] for made in model["plans"]]
    assert (model["architecture"], model["layers"], model["experts_per_layer"]) == ("LlamaForCausalLM", 2, None)
    assert model["units"] == len(plan["choice"])


def test_an_evaluation_becomes_part_of_its_plan(
    jobs_service: RunningService, worker: Worker, plan: dict[str, Any]
) -> None:
    before = jobs_service.get(f"/plans/{plan['id']}")
    job = do(jobs_service, worker, "evaluate", plan)
    shipped = next(row for row in job["result"]["evaluation"] if row["shipped"])
    after = jobs_service.get(f"/plans/{plan['id']}", headers={"If-None-Match": before.headers["etag"]})
    assert after.status_code == 200
    assert after.json()["measured_kl"] == shipped["kl"]
    assert after.json()["interval"] == [shipped["kl_low"], shipped["kl_high"]]
    assert shipped["memory_bytes"] == plan["bytes"]


def test_a_packed_model_is_as_long_as_its_plan_says_and_can_be_fetched(
    jobs_service: RunningService, worker: Worker, plan: dict[str, Any], tmp_path: Path
) -> None:
    export_id = do(jobs_service, worker, "apply", plan)["result"]["export_id"]
    document = jobs_service.get(f"/exports/{export_id}").json()
    assert document["engine"] == "bitplan"
    weights = next(file for file in document["files"] if file["name"].endswith(".safetensors"))
    assert weights["bytes"] == plan["bytes"]
    archive = jobs_service.get(f"/exports/{export_id}/archive")
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as opened:
        opened.extractall(tmp_path, filter="data")
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} == {f["name"] for f in document["files"]}
    assert load_packed(tmp_path)[0] is not None
    fetched = jobs_service.get(weights["url"])
    assert fetched.content == (tmp_path / weights["name"]).read_bytes()
    again = jobs_service.get(weights["url"], headers={"If-None-Match": fetched.headers["etag"]})
    assert again.status_code == 304


def test_an_export_has_its_command(jobs_service: RunningService, worker: Worker, measured: dict[str, Any]) -> None:
    body = {"profile_id": measured["result"]["profile_id"], "budget": {"bits_per_weight": 9}, "engine": "mlx-lm"}
    legal = jobs_service.post("/plans", body).json()
    export_id = do(jobs_service, worker, "export", legal, engine="mlx-lm")["result"]["export_id"]
    document = jobs_service.get(f"/exports/{export_id}").json()
    assert (document["engine"], document["command"]) == ("mlx-lm", "mlx_lm.generate --model DIRECTORY --prompt 'The'")
    assert any(file["name"].endswith(".safetensors") for file in document["files"])


def test_an_export_that_the_engine_cannot_load_fails_and_leaves_nothing(
    jobs_service: RunningService, worker: Worker, plan: dict[str, Any], settings: ServiceSettings
) -> None:
    body = {"kind": "export", "plan_id": plan["id"], "options": {"engine": "tensorrt-llm"}}
    job = finish(jobs_service, worker, jobs_service.post("/jobs", body).json()["id"])
    assert (job["state"], job["result"], job["error"]["title"]) == ("failed", None, "Job failed")
    assert "a plan must keep the rules of the engine" in job["error"]["detail"]
    assert not list((settings.directory / "artefacts").glob(f"*{job['id']}*"))
    # What failed may be asked for again.
    assert jobs_service.post("/jobs", body).status_code == 202


def test_a_report_opens_in_a_sandbox(jobs_service: RunningService, worker: Worker, plan: dict[str, Any]) -> None:
    report_id = do(jobs_service, worker, "report", plan)["result"]["report_id"]
    document = jobs_service.get(f"/reports/{report_id}").json()
    page = next(file for file in document["files"] if file["name"] == "report.html")
    answer = jobs_service.get(page["url"])
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"].startswith("sandbox allow-scripts")
    assert "allow-same-origin" not in answer.headers["content-security-policy"]
    assert len(answer.content) == page["bytes"]


def test_a_report_has_the_files_that_are_asked_for(
    jobs_service: RunningService, worker: Worker, plan: dict[str, Any]
) -> None:
    pdf = any(shutil.which(name) for name in BROWSERS)
    job = do(jobs_service, worker, "report", plan, parquet=True, **({"pdf": True} if pdf else {}))
    files = jobs_service.get(f"/reports/{job['result']['report_id']}").json()["files"]
    by_kind = {Path(file["name"]).suffix: file for file in files}
    assert jobs_service.get(by_kind[".parquet"]["url"]).content.startswith(b"PAR1")
    assert by_kind[".parquet"]["media_type"] == "application/vnd.apache.parquet"
    assert (".pdf" in by_kind) == pdf
    if pdf:
        assert jobs_service.get(by_kind[".pdf"]["url"]).content.startswith(b"%PDF")


def test_two_plans_are_compared(
    jobs_service: RunningService, worker: Worker, plan: dict[str, Any], measured: dict[str, Any]
) -> None:
    body = {"profile_id": measured["result"]["profile_id"], "budget": {"bits_per_weight": 6.0}}
    other = jobs_service.post("/plans", body).json()
    asked = {"kind": "report", "plan_ids": [plan["id"], other["id"]]}
    submitted = jobs_service.post("/jobs", asked)
    assert submitted.status_code == 202, submitted.text
    job = finish(jobs_service, worker, submitted.json()["id"])
    assert job["state"] == "succeeded", job["error"]
    assert (job["plan_ids"], job["options"]) == (asked["plan_ids"], {})
    document = jobs_service.get(f"/reports/{job['result']['report_id']}").json()
    page = next(file for file in document["files"] if file["name"] == "comparison.html")
    text = jobs_service.get(page["url"]).text
    assert "bits per weight &lt;= 8.6" in text and "bits per weight &lt;= 6" in text
    assert jobs_service.post("/jobs", asked).status_code == 200
    turned = {"kind": "report", "plan_ids": asked["plan_ids"][::-1]}
    assert jobs_service.post("/jobs", turned).status_code == 202


def test_a_timed_profile_answers_latencies_without_any_kernel(
    jobs_service: RunningService, worker: Worker, measured: dict[str, Any], settings: ServiceSettings
) -> None:
    profile_id = measured["result"]["profile_id"]
    assert not jobs_service.get(f"/profiles/{profile_id}").json()["has_latency"]
    body = {"kind": "measure", "model_id": measured["model_id"], "options": {**MEASURE, "latency": True}}
    job = finish(jobs_service, worker, jobs_service.post("/jobs", body).json()["id"])
    assert job["result"]["profile_id"] == profile_id
    assert jobs_service.get(f"/profiles/{profile_id}").json()["has_latency"]
    points = jobs_service.get(f"/frontiers/{profile_id}?resource=latency_us&points=5").json()["points"]
    assert [p["use"] for p in points] == sorted(p["use"] for p in points)
    question = {"profile_id": profile_id, "budget": {"latency_us": points[2]["use"]}}
    answer = jobs_service.post("/plans", question).json()
    assert answer["latency_us"] <= points[2]["use"]
    assert answer["predicted_loss"] == pytest.approx(points[2]["predicted_loss"])
    assert all(row["latency_us"] > 0 for row in answer["baselines"])
    # A process of its own, in which nothing has selected kernels before the question.
    done = subprocess.run(
        [sys.executable, "-c", ASK_LATENCY, str(settings.store_root), profile_id], check=True, capture_output=True
    )
    assert done.stdout.split() == [b"latency_us", b"0"]


ASK_LATENCY = """
import sys
from pathlib import Path
from allocator.service.priced_profiles import Axes, PricedProfiles
from allocator.store import Store
from runtime.kernels import cpu

profiles = PricedProfiles(Store(Path(sys.argv[1])), 1)
print([name for name in profiles.find(Axes(profile_id=sys.argv[2], timed=True)).tables][-1])
print(cpu._load_library.cache_info().misses)
"""


def test_events_show_every_change_until_the_end(
    jobs_service: RunningService, worker: Worker, plan: dict[str, Any]
) -> None:
    body = {"kind": "evaluate", "plan_id": plan["id"], "options": {"text": "calibration.txt"}}
    job_id = jobs_service.post("/jobs", body).json()["id"]
    with jobs_service.client.stream("GET", f"/jobs/{job_id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert next(lines) == "event: job"
        finish(jobs_service, worker, job_id)
        text = "\n".join(["event: job", *lines])
    blocks = [dict(line.split(": ", 1) for line in block.split("\n")) for block in text.strip().split("\n\n")]
    assert [block["event"] for block in blocks][-1] == "end"
    states = [json.loads(block["data"])["state"] for block in blocks if block["event"] == "job"]
    assert (states[0], states[-1]) == ("queued", "succeeded")
    versions = [int(block["id"]) for block in blocks if block["event"] == "job"]
    assert versions == sorted(set(versions))


def test_a_job_that_is_over_cannot_be_cancelled(jobs_service: RunningService, measured: dict[str, Any]) -> None:
    answer = jobs_service.client.delete(f"/jobs/{measured['id']}")
    assert (answer.status_code, answer.json()["title"]) == (409, "Conflict")


@contextmanager
def work_apart(running: RunningService, settings: ServiceSettings, job_id: str) -> Iterator["subprocess.Popen[str]"]:
    """Gives a worker in a process of its own, as a server starts it, that has begun a job."""
    process = subprocess.Popen(
        [sys.executable, "-m", "allocator.service.worker_process"],
        env={**os.environ, SETTINGS_VARIABLE: settings.to_json(), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while running.get(f"/jobs/{job_id}").json()["state"] != "running":
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_cancelling_ends_the_work(
    jobs_service: RunningService, settings: ServiceSettings, measured: dict[str, Any]
) -> None:
    body = {"kind": "measure", "model_id": measured["model_id"], "options": {**MEASURE, "seed": 2}}
    job_id = jobs_service.post("/jobs", body).json()["id"]
    with work_apart(jobs_service, settings, job_id) as process:
        assert jobs_service.client.delete(f"/jobs/{job_id}").json()["state"] == "cancelled"
        assert process.stderr is not None
        taken, said = (entry for entry in islice(map(json.loads, process.stderr), 3) if entry.get("job") == job_id)
    assert (taken["message"], said["message"]) == ("job taken", "job lost")
    job = jobs_service.get(f"/jobs/{job_id}").json()
    assert (job["state"], job["result"]) == ("cancelled", None)
    profiles = jobs_service.get(f"/models/{measured['model_id']}").json()["profiles"]
    assert [profile["id"] for profile in profiles] == [measured["result"]["profile_id"]]


@pytest.mark.parametrize(("told", "seed"), [("terminate", 3), ("terminate, then the server's pipe closes", 4)])
def test_a_worker_that_is_told_to_stop_gives_its_job_back(
    told: str, seed: int, jobs_service: RunningService, settings: ServiceSettings, measured: dict[str, Any]
) -> None:
    # A seed of its own: an identical request of another test would be answered with that test's job.
    body = {"kind": "measure", "model_id": measured["model_id"], "options": {**MEASURE, "seed": seed}}
    job_id = jobs_service.post("/jobs", body).json()["id"]
    with work_apart(jobs_service, settings, job_id) as process:
        process.terminate()
        if told == "terminate":
            assert process.wait(PATIENCE_S) == 0
        else:
            process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    job = jobs_service.get(f"/jobs/{job_id}").json()
    assert (job["state"], job["attempts"]) == ("queued", 0)
    assert finish(jobs_service, Worker(settings), job_id)["state"] == "succeeded"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"kind": "measure"}, "must name a model_id"),
        ({"kind": "evaluate"}, "must name a plan_id"),
        ({"kind": "dance"}, "/body/kind"),
        ({"kind": "measure", "options": {"typo": 1}}, "options of 'measure' must be among"),
        ({"kind": "measure", "options": {"formats": ["int99"]}}, "int99"),
        ({"kind": "measure", "options": {"fisher_sequences": "many"}}, "config.fisher_sequences"),
        ({"kind": "measure", "options": {"fisher_sequences": 0}}, "fisher_sequences must be at least 2"),
        ({"kind": "measure", "options": {"engine": "none"}}, "engine must be a known name"),
        ({"kind": "export", "options": {}}, "engine must be a known name"),
        ({"kind": "report", "options": {"pdf": "yes"}}, "option 'pdf' of 'report' must be true or false"),
        ({"kind": "evaluate", "plan_ids": ["a", "b"]}, "must name a plan_id, or a 'report' two plan_ids"),
        ({"kind": "apply", "options": {"out": "elsewhere"}}, "options of 'apply' must be among none"),
    ],
    ids=str,
)
def test_a_wrong_job_is_refused(
    jobs_service: RunningService, measured: dict[str, Any], plan: dict[str, Any], body: dict[str, Any], words: str
) -> None:
    named = {"model_id": measured["model_id"]} if body["kind"] == "measure" else {"plan_id": plan["id"]}
    sent = {**named, **body} if "options" in body else body
    answer = jobs_service.post("/jobs", sent)
    assert answer.status_code == 400
    assert words in answer.json()["detail"]


def test_a_repeated_key_gives_the_first_answer(jobs_service: RunningService, measured: dict[str, Any]) -> None:
    body = {"kind": "measure", "model_id": measured["model_id"], "options": {**MEASURE, "seed": 9}}
    header = {"Idempotency-Key": "once"}
    first = jobs_service.post("/jobs", body, headers=header)
    second = jobs_service.post("/jobs", body, headers=header)
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json() == second.json()
    jobs_service.client.delete(f"/jobs/{first.json()['id']}")
    other = jobs_service.post("/jobs", {**body, "options": MEASURE}, headers=header)
    assert (other.status_code, "an Idempotency-Key must go with one body" in other.text) == (422, True)
    assert jobs_service.post("/jobs", body, headers={"Idempotency-Key": "x" * 201}).status_code == 400
    # A refused request leaves its key free.
    assert jobs_service.post("/jobs", {"kind": "measure"}, headers={"Idempotency-Key": "new"}).status_code == 400
    assert (
        jobs_service.post("/jobs", {**body, "options": MEASURE}, headers={"Idempotency-Key": "new"}).status_code == 200
    )


def test_a_changed_text_is_another_request(
    jobs_service: RunningService, settings: ServiceSettings, measured: dict[str, Any]
) -> None:
    text = settings.model_roots[0] / "own.txt"
    text.write_text("one")
    body = {"kind": "measure", "model_id": measured["model_id"], "options": {**MEASURE, "calibration": "own.txt"}}
    first = jobs_service.post("/jobs", body)
    text.write_text("another")
    second = jobs_service.post("/jobs", body)
    assert (first.status_code, second.status_code) == (202, 202)
    for answer in (first, second):
        jobs_service.client.delete(f"/jobs/{answer.json()['id']}")


def test_a_defect_keeps_its_words_in_the_log() -> None:
    assert "secret" not in describe_problem(KeyError("secret"))["detail"]
    assert describe_problem(ValueError("say this"))["detail"] == "say this"


def test_health_and_metrics(jobs_service: RunningService, measured: dict[str, Any]) -> None:
    assert jobs_service.get("/readyz").json() == {"status": "ready"}
    text = jobs_service.get("/metrics").text
    assert 'bitplan_jobs{state="succeeded"}' in text
    assert 'bitplan_requests_total{method="GET",path="/jobs/{job_id}",status="200"}' in text
    assert measured["id"] not in text
    engines = jobs_service.get("/engines").json()["items"]
    assert {"llama.cpp", "vllm"} <= {engine["name"] for engine in engines}
