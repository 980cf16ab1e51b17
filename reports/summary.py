"""What an index of reports needs to know of each: its headline, as a small JSON file beside the page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from reports.atomic_files import write_atomically
from reports.report import Headline, Report

SUMMARY_FILE = "summary.json"
SUMMARY_VERSION = 1
# What null stands for.
_UNKNOWN = {"predicted_kl": math.nan, "relative_gap": math.inf, "lower_bound": -math.inf}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A report in one row: its title, its model, its headline and where its numbers come from."""

    title: str
    model_name: str
    headline: Headline
    provenance: dict[str, str]


def write_summary(report: Report, directory: Path | str) -> Path:
    """Writes the summary of a report into its directory, atomically, and returns its path."""
    numbers = {name: _jsonable(value) for name, value in asdict(report.headline).items()}
    document = {
        "schema_version": SUMMARY_VERSION,
        "title": report.title,
        "model_name": report.model_name,
        "headline": numbers,
        "provenance": report.provenance,
    }
    path = Path(directory) / SUMMARY_FILE
    write_atomically(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


def load_summary(directory: Path | str) -> Summary:
    """Returns the summary in a report's directory.

    Raises:
        ValueError: if there is none, or it is damaged or of another version.
    """
    path = Path(directory) / SUMMARY_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = document["schema_version"]
        if found != SUMMARY_VERSION:
            msg = f"schema_version must be {SUMMARY_VERSION}, got {found}"
            raise ValueError(msg)
        return Summary(
            title=str(document["title"]),
            model_name=str(document["model_name"]),
            headline=_headline(document["headline"]),
            provenance={str(name): str(value) for name, value in document["provenance"].items()},
        )
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        msg = (
            f"a report's directory must hold a {SUMMARY_FILE} of this version: got '{path}' "
            f"({type(error).__name__}: {error}). Write the report again."
        )
        raise ValueError(msg) from error


def _headline(record: dict[str, Any]) -> Headline:
    known = {field.name for field in fields(Headline)}
    values: dict[str, Any] = {n: _UNKNOWN.get(n) if v is None else v for n, v in record.items() if n in known}
    return Headline(**values)


def _jsonable(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
