"""The OpenAPI document: what FastAPI derives from the routes, and that every error is a problem document."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from allocator.service.problem_details import PROBLEM_TYPE

PROBLEM_SCHEMA = {
    "type": "object",
    "title": "Problem",
    "description": "Problem details, RFC 9457.",
    "required": ["type", "title", "status", "detail", "instance"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string"},
        "least_reachable": {"type": "object", "additionalProperties": {"type": ["number", "null"]}},
        "errors": {"type": "array", "items": {"type": "object"}},
    },
}
_ALWAYS = (400, 401, 403, 404, 408, 413, 421, 500, 503, 504)
_OF_METHOD = {"post": (409, 415, 422), "delete": (409,), "get": ()}
_METHODS = ("get", "post", "delete")


def describe(app: FastAPI) -> dict[str, Any]:
    """Returns the document, made once."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            summary="Storage formats of language models for a budget: measured, planned, exported.",
            routes=app.routes,
        )
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        schemas["Problem"] = PROBLEM_SCHEMA
        for operations in document["paths"].values():
            for method in _METHODS:
                if method in operations:
                    _complete(method, operations[method])
        app.openapi_schema = document
    return app.openapi_schema


def _complete(method: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    for status in (*_ALWAYS, *_OF_METHOD[method]):
        responses[str(status)] = {
            "description": "Problem",
            "content": {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
    if method == "post":
        operation.setdefault("parameters", []).append(
            {
                "name": "Idempotency-Key",
                "in": "header",
                "required": False,
                "schema": {"type": "string", "minLength": 1, "maxLength": 200},
                "description": "The same key with the same body is answered as the first time.",
            }
        )
