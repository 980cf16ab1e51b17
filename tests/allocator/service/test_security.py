"""What the service refuses: foreign hosts and pages, keys that open nothing, paths outside, bodies too large."""

import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from allocator.service.allowed_paths import ForbiddenPath, check_contents, resolve_below
from allocator.service.api_keys import ApiKeys
from allocator.service.database import Database
from allocator.service.logs import JsonLines, hide_secrets
from allocator.service.serving import check_keys
from allocator.service.settings import ServiceSettings, settings_from_json
from sensitivity.profile import SensitivityProfile
from tests.allocator.service.running_service import RunningService, run_in_thread


@pytest.fixture(scope="module")
def locked(service_settings: ServiceSettings) -> Iterator[RunningService]:
    """The service, asking for keys."""
    with run_in_thread(dataclasses.replace(service_settings, require_keys=True)) as running:
        yield running


def header(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_without_a_key_nothing_is_opened_but_the_health(locked: RunningService) -> None:
    for path in ("/models", "/jobs", "/plans", "/profiles", "/engines", "/metrics", "/reports/x", "/exports/x/archive"):
        answer = locked.get(path)
        assert (answer.status_code, answer.json()["title"]) == (401, "Unauthorized")
        assert answer.headers["www-authenticate"].startswith("Bearer")
    assert locked.get("/healthz").status_code == 200
    assert locked.get("/readyz").status_code == 200


@pytest.mark.parametrize("key", ["x", "bp_0123456789abcdef_" + "A" * 43, "bp_" + "0" * 400, "bp_é"])
def test_a_key_that_was_never_made_opens_nothing(locked: RunningService, key: str) -> None:
    answer = locked.client.get("/models", headers=[(b"Authorization", b"Bearer " + key.encode())])
    assert answer.status_code == 401


def test_each_scope_opens_what_it_is_for(locked: RunningService) -> None:
    keys = locked.service.keys
    by_scope = {scope: header(keys.add(scope, scope)[1]) for scope in ("read", "plan", "admin")}
    calls: dict[str, Any] = {
        "read": lambda h: locked.get("/models", headers=h),
        "plan": lambda h: locked.post("/plans", {"profile_id": "0", "budget": {"max_kl": 1}}, headers=h),
        "admin": lambda h: locked.post("/models", {"path": "tiny"}, headers=h),
    }
    for sent, call in [(s, c) for s in by_scope for c in calls]:
        status = calls[call](by_scope[sent]).status_code
        included = ["read", "plan", "admin"].index(sent) >= ["read", "plan", "admin"].index(call)
        assert (status != 403) == included, (sent, call, status)


def test_a_key_is_kept_as_a_hash_and_ends_when_it_is_revoked(database: Database) -> None:
    keys = ApiKeys(database)
    key_id, key = keys.add("a", "read")
    secret = key.rpartition("_")[2] if "_" not in key.split("_", 2)[2] else key.split("_", 2)[2]
    with database.reading() as connection:
        row = connection.exec_driver_sql("SELECT * FROM api_keys").one()
    assert all(secret.encode() not in (v if isinstance(v, bytes) else str(v).encode()) for v in map(_plain, row))
    found = keys.check(key)
    assert found is not None and found.key_id == key_id
    assert keys.check(key[:-1] + ("A" if key[-1] != "A" else "B")) is None
    keys.revoke(key_id)
    assert keys.check(key) is None
    assert [(k.key_id, k.is_valid) for k in keys.list_page(limit=9)[0]] == [(key_id, False)]


def _plain(value: Any) -> Any:
    return bytes(value) if isinstance(value, memoryview) else value


def test_a_rotated_key_works_for_a_while_beside_the_new_one(database: Database) -> None:
    keys = ApiKeys(database)
    key_id, old = keys.add("a", "plan")
    _, new = keys.rotate(key_id, overlap_s=0.3)
    assert keys.check(old) is not None and keys.check(new) is not None
    time.sleep(0.35)
    assert keys.check(old) is None
    found = keys.check(new)
    assert found is not None and (found.name, found.scope) == ("a", "plan")
    with pytest.raises(ValueError, match="a key must be valid to be replaced: got '"):
        keys.rotate(key_id)


def test_a_key_that_has_ended_opens_nothing(database: Database) -> None:
    keys = ApiKeys(database)
    assert keys.check(keys.add("a", "read", expires_at=time.time() - 1)[1]) is None


def test_what_is_wrong_with_a_key_is_said(database: Database) -> None:
    keys = ApiKeys(database)
    with pytest.raises(ValueError, match="a key's scope must be among read, plan, admin: got 'root'"):
        keys.add("a", "root")
    with pytest.raises(ValueError, match="a key must be known to be revoked: got 'none'"):
        keys.revoke("none")


def test_a_server_that_others_can_reach_needs_a_key(database: Database, tmp_path: Path) -> None:
    open_to_all = ServiceSettings(store_root=tmp_path, host="0.0.0.0")
    assert open_to_all.needs_keys
    with pytest.raises(ValueError, match="a server that other machines can reach must have API keys"):
        check_keys(open_to_all, database)
    check_keys(ServiceSettings(store_root=tmp_path), database)
    ApiKeys(database).add("a", "admin")
    check_keys(open_to_all, database)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost@evil.example", "[::2]:80"])
def test_a_foreign_host_header_is_refused(running: RunningService, host: str) -> None:
    answer = running.get("/models", headers={"Host": host})
    assert (answer.status_code, answer.json()["title"]) == (421, "Misdirected request")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:8420"])
def test_the_names_of_this_machine_are_answered(running: RunningService, host: str) -> None:
    assert running.get("/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example:8420"])
def test_a_page_elsewhere_can_ask_for_nothing(running: RunningService, origin: str) -> None:
    answer = running.post("/models", {"path": "tiny"}, headers={"Origin": origin})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


def test_a_body_that_says_nothing_of_json_is_not_taken_for_it(running: RunningService) -> None:
    # What a form of a page elsewhere can send without asking.
    answer = running.client.post("/models", content=b'{"path": "tiny"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400


def test_every_response_tells_browsers_to_take_nothing_from_elsewhere(running: RunningService) -> None:
    for path in ("/models", "/none", "/healthz"):
        headers = running.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe-eval" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    assert running.get("/reports/x/y").headers["content-security-policy"].startswith("sandbox ")


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../",
        "tiny/../..",
        "/etc",
        "/etc/passwd",
        "tiny/../../../../../../etc",
        ".",
        "",
        " ",
        "tiny\0",
        "~root",
        "file:///etc",
        "none",
        "a" * 4000,
        "huggingface/model",
        "outside",
        "outside/etc",
        "loop",
    ],
)
def test_no_path_leads_out_of_the_roots(tmp_path: Path, running: RunningService, path: str) -> None:
    root = tmp_path / "root"
    (root / "tiny").mkdir(parents=True)
    (root / "outside").symlink_to("/")
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(ForbiddenPath, match="a path must name something below the directories"):
        resolve_below(path, [root])
    answer = running.post("/models", {"path": path})
    assert answer.status_code in (400, 403)


def test_what_is_outside_is_answered_as_what_is_not_there(running: RunningService) -> None:
    there, nowhere = (running.post("/models", {"path": path}).json() for path in ("/etc/passwd", "/etc/nothing"))
    assert there["detail"].replace("/etc/passwd", "X") == nowhere["detail"].replace("/etc/nothing", "X")


def test_links_that_stay_inside_are_followed(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "tiny")
    assert resolve_below("link", [tmp_path]) == tmp_path / "tiny"
    assert resolve_below(str(tmp_path / "tiny"), [tmp_path / "other", tmp_path]) == tmp_path / "tiny"


def test_a_link_in_a_model_that_leads_out_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "root" / "model"
    model.mkdir(parents=True)
    (tmp_path / "root" / "blob").write_text("weights")
    (model / "model.safetensors").symlink_to(tmp_path / "root" / "blob")
    check_contents(model, [tmp_path / "root"])
    (model / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(ForbiddenPath, match="links in a model's directory must end below the allowed directories"):
        check_contents(model, [tmp_path / "root"])


@pytest.mark.parametrize("name", ["calibration", "selection", "evaluation"])
def test_texts_of_a_measurement_must_lie_below_the_roots(running: RunningService, name: str) -> None:
    body = {"kind": "measure", "model_id": running.add_model(), "options": {name: "/etc/passwd"}}
    assert running.post("/jobs", body).status_code == 403
    body["options"] = {name: "some/dataset"}
    assert running.post("/jobs", body).status_code == 403


@pytest.mark.parametrize("name", ["%2e%2e%2fservice.sqlite3", "..%2f..%2fservice.sqlite3", "/etc/passwd"])
def test_no_file_of_an_artefact_leads_out(running: RunningService, name: str) -> None:
    assert running.get(f"/exports/none/{name}").status_code == 404


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(running: RunningService, chunked: bool) -> None:
    body = json.dumps({"path": "x" * running.service.settings.most_body_bytes}).encode()
    content = iter([body[:1000], body[1000:]]) if chunked else body
    answer = running.client.post("/models", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["title"]) == (413, "Request Entity Too Large")


def test_a_name_cannot_be_longer_than_a_name(running: RunningService) -> None:
    assert running.post("/models", {"path": "tiny", "name": "x" * 201}).status_code == 400


def test_what_takes_too_long_is_given_up(
    service_settings: ServiceSettings, tiny_profile: SensitivityProfile, tmp_path: Path
) -> None:
    hurried = dataclasses.replace(
        service_settings, request_s=0.005, database_url=f"sqlite:///{tmp_path / 'hurried.sqlite3'}"
    )
    with run_in_thread(hurried) as running:
        running.service.database.migrate()
        answer = running.get(f"/frontiers/{tiny_profile.fingerprint}?points=257")
        if answer.status_code != 504:
            # So few milliseconds may be enough to find nothing; a model takes longer to read.
            answer = running.post("/models", {"path": "tiny"})
        assert (answer.status_code, answer.json()["title"]) == (504, "Gateway Timeout")


def test_a_body_that_never_ends_is_given_up(service_settings: ServiceSettings, tmp_path: Path) -> None:
    import socket

    hurried = dataclasses.replace(
        service_settings, request_s=0.2, database_url=f"sqlite:///{tmp_path / 'hurried.sqlite3'}"
    )
    with run_in_thread(hurried) as running:
        port = httpx2.URL(running.url).port
        assert port is not None
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /models HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
            connection.settimeout(10)
            assert b" 408 " in connection.recv(200)


SPREADSHEET, PAGE, SQL = "=cmd()|'/c calc'!A0", "<script>alert(1)</script>", "'; DROP TABLE models; --"


@pytest.mark.parametrize("name", [SPREADSHEET, PAGE, SQL, "\u202e"])
def test_a_name_is_only_a_name(service_settings: ServiceSettings, tmp_path: Path, name: str) -> None:
    settings = dataclasses.replace(service_settings, database_url=f"sqlite:///{tmp_path / 'names.sqlite3'}")
    with run_in_thread(settings) as running:
        made = running.post("/models", {"path": "tiny", "name": name})
        assert made.json()["name"] == name
        answer = running.get(f"/models/{made.json()['id']}")
        assert answer.json()["name"] == name
        # As JSON that is not to be taken for anything else, it is harmless wherever a browser meets it.
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert running.get("/models").json()["items"][0]["name"] == name


def test_queries_are_no_sql(running: RunningService) -> None:
    for query in ("model_id=' OR 1=1 --", "state=queued' OR '1", "cursor=' OR 1=1", "limit=1; DROP TABLE jobs"):
        assert running.get(f"/jobs?{query}").status_code == 400
    assert running.get("/plans/' OR 1=1 --").status_code == 404


def test_secrets_do_not_get_into_logs() -> None:
    key = "bp_0123456789abcdef_" + "s" * 43
    record = logging.makeLogRecord({"msg": f"got {key}", "url": "postgresql://me:secret@host/x", "name": "x"})
    record.headers = {"authorization": f"Bearer {key}"}
    line = JsonLines().format(record)
    assert "s" * 43 not in line and "secret@" not in line
    assert json.loads(line)["message"] == "got bp_0123456789abcdef_[hidden]"
    assert hide_secrets("Authorization: bearer abc") == "Authorization: bearer [hidden]"


def test_settings_go_to_workers_whole(service_settings: ServiceSettings) -> None:
    assert settings_from_json(service_settings.to_json()) == service_settings
    with pytest.raises(ValueError, match="settings of the service must be positive: got lease_s=0"):
        dataclasses.replace(service_settings, lease_s=0)
