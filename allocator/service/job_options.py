"""Options of jobs: JSON values checked against the fields of the requests they become, one list for all."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allocator.service.allowed_paths import resolve_below

if TYPE_CHECKING:
    from allocator.measuring import MeasureRequest

TEXTS = ("calibration", "selection", "evaluation")
SAMPLED = "self-balanced"
# Options of a measurement that are no fields of its request.
_BESIDE = ("engine", "low_memory", "latency")
# A job 'report' of two plans.
COMPARISON = "comparison"
# Kind -> options that it takes; those of a measurement are the fields of its request.
OPTIONS: dict[str, tuple[str, ...]] = {
    "evaluate": ("text",),
    "apply": (),
    "export": ("engine",),
    "report": ("text", "pdf", "parquet"),
    COMPARISON: ("text",),
}


def check_options(kind: str, options: Mapping[str, Any], roots: Sequence[Path]) -> None:
    """Checks the options of a job.

    Args:
        kind: Name in ``JOB_KINDS``, or ``COMPARISON``.
        options: JSON values.
        roots: Directories below which texts may lie.

    Raises:
        ValueError: If an option is unknown or wrong.
        ForbiddenPath: If a text is not below the roots.
    """
    if kind == "measure":
        make_measure_request(options, roots)
        return
    _check_names(kind, options, OPTIONS[kind])
    if kind == "export":
        from runtime.engines import find_engine

        find_engine(str(options.get("engine")))
    if kind == "report":
        _check_files(options)
    list_texts(options, ("text",), roots)


def make_measure_request(options: Mapping[str, Any], roots: Sequence[Path]) -> "MeasureRequest":
    """Returns the request of a measurement.

    Args:
        options: Fields of ``MeasureRequest`` and of ``MeasureConfig``, with ``engine`` for an engine's formats,
            ``low_memory`` for a model that is read block by block, and ``latency`` to time the candidates as well.
        roots: Directories below which texts may lie.

    Raises:
        ValueError: If an option is unknown or wrong.
        ForbiddenPath: If a text is not below the roots.
    """
    from pydantic import TypeAdapter, ValidationError

    from allocator.measuring import MeasureRequest
    from runtime.engines import find_engine
    from runtime.formats import find_formats
    from sensitivity.measure_config import MeasureConfig

    amounts = {field.name for field in dataclasses.fields(MeasureConfig)}
    own = {field.name for field in dataclasses.fields(MeasureRequest)} - {"config"}
    _check_names("measure", options, [*sorted(own | amounts), *_BESIDE])
    given = {name: value for name, value in options.items() if name not in _BESIDE}
    if options.get("engine") is not None:
        given.setdefault("formats", list(find_engine(str(options["engine"])).menu))
    given |= list_texts(options, TEXTS, roots)
    split = {name: value for name, value in given.items() if name in own}
    split["config"] = {name: value for name, value in given.items() if name in amounts}
    try:
        request: MeasureRequest = TypeAdapter(MeasureRequest).validate_python(split)
    except ValidationError as error:
        raise ValueError(_describe(error)) from error
    find_formats([*request.formats, *(request.embedding_formats or ())])
    return request


def list_texts(options: Mapping[str, Any], names: Sequence[str], roots: Sequence[Path]) -> dict[str, str | None]:
    """Returns the named options as real paths below the roots, None where they are not given.

    Data sets by name are not among them: a server fetches nothing.

    Raises:
        ForbiddenPath: If a text is not below the roots.
    """
    found: dict[str, str | None] = {}
    for name in names:
        text = options.get(name)
        sampled = text is None or text == SAMPLED
        found[name] = text if sampled else str(resolve_below(str(text), roots))
    return found


def _check_files(options: Mapping[str, Any]) -> None:
    """Checks what a report is asked to write besides its page; what is not installed is said before the job waits."""
    from reports.browser import find_browser
    from reports.parquet_files import import_pyarrow

    for name in ("pdf", "parquet"):
        if not isinstance(options.get(name, False), bool):
            msg = f"option '{name}' of 'report' must be true or false: got {options[name]!r}. Correct it."
            raise ValueError(msg)
    try:
        if options.get("pdf"):
            find_browser()
        if options.get("parquet"):
            import_pyarrow()
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error


def _check_names(kind: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(options) - set(known))
    if unknown:
        msg = f"options of '{kind}' must be among {', '.join(known) or 'none'}: got {unknown}. Leave them out."
        raise ValueError(msg)


def _describe(error: Any) -> str:
    found = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
    return f"options of 'measure' must have the values of its fields: got {found}."
