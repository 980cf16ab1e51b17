"""The OpenAPI document: what it says holds for what a generator sends, and no request is answered with a defect."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from allocator.service.app import make_app
from allocator.service.settings import ServiceSettings
from sensitivity.profile import SensitivityProfile
from tests.allocator.service.running_service import RunningService

EXAMPLES = 25
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
OPERATIONS = (
    ("GET", "/models"),
    ("POST", "/models"),
    ("GET", "/models/{model_id}"),
    ("GET", "/profiles"),
    ("GET", "/profiles/{profile_id}"),
    ("GET", "/frontiers/{profile_id}"),
    ("POST", "/jobs"),
    ("GET", "/jobs"),
    ("GET", "/jobs/{job_id}"),
    ("DELETE", "/jobs/{job_id}"),
    ("GET", "/jobs/{job_id}/events"),
    ("POST", "/plans"),
    ("GET", "/plans"),
    ("GET", "/plans/{plan_id}"),
    ("GET", "/plans/{plan_id}/file"),
    ("GET", "/plans/{plan_id}/units/{unit}"),
    ("GET", "/reports/{report_id}"),
    ("GET", "/reports/{report_id}/{file}"),
    ("GET", "/exports/{export_id}"),
    ("GET", "/exports/{export_id}/archive"),
    ("GET", "/exports/{export_id}/{file}"),
    ("GET", "/engines"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
)


def test_every_operation_is_listed_here(running: RunningService) -> None:
    document = running.get("/openapi.json").json()
    found = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert found == set(OPERATIONS)


@pytest.fixture(scope="module")
def known(running: RunningService, tiny_profile: SensitivityProfile) -> dict[str, str]:
    """Names of what exists, so that answers of both kinds are seen."""
    profile_id = running.add_profile(tiny_profile.fingerprint)
    plan = running.post("/plans", {"profile_id": profile_id, "budget": {"bits_per_weight": 5}}).json()
    units = {"profile_id": profile_id, "plan_id": plan["id"], "model_id": plan["model_id"]}
    return {**units, "unit": next(iter(plan["choice"]))}


@pytest.fixture(scope="module")
def schema(running: RunningService) -> Any:
    return schemathesis.openapi.from_url(f"{running.url}/openapi.json")


# They take no parameter and no body.
NOTHING_TO_GET_WRONG = (("GET", "/healthz"), ("GET", "/readyz"))
CASES = [(*operation, GenerationMode.POSITIVE) for operation in OPERATIONS] + [
    (*operation, GenerationMode.NEGATIVE) for operation in OPERATIONS if operation not in NOTHING_TO_GET_WRONG
]


@pytest.mark.parametrize(("method", "path", "mode"), CASES, ids=lambda part: str(getattr(part, "value", part)))
def test_an_operation_keeps_its_description(
    schema: Any, known: dict[str, str], method: str, path: str, mode: GenerationMode
) -> None:
    operation = schema[path][method]
    held = {name: value for name, value in known.items() if f"{{{name}}}" in path}

    @settings(max_examples=EXAMPLES, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(mode), exists=st.booleans())
    def check(case: Any, exists: bool) -> None:
        if exists and held and mode is GenerationMode.POSITIVE:
            case.path_parameters.update(held)
        case.call_and_validate(checks=CHECKS)

    check()


def test_the_description_can_be_made_without_a_server(service_settings: ServiceSettings, tmp_path: Path) -> None:
    _, app = make_app(dataclasses.replace(service_settings, store_root=tmp_path))
    assert app.openapi()["info"]["title"] == "bitplan"
    assert not (tmp_path / "service" / "service.sqlite3").exists()
