"""Structured logs: one JSON object a line on stderr, without what must not be in them."""

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
# Keys of the service, passwords in URLs of databases, and authorization headers.
_SECRETS = (
    (re.compile(r"bp_([0-9a-f]{8,16})_[A-Za-z0-9_-]+"), r"bp_\1_[hidden]"),
    (re.compile(r"(://[^:/@\s]+):[^@\s]+@"), r"\1:[hidden]@"),
    (re.compile(r"(?i)(bearer\s+)[^\s\"']+"), r"\1[hidden]"),
)


class JsonLines(logging.Formatter):
    """Formats records as JSON objects."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns a record as one line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: value for name, value in vars(record).items() if name not in _STANDARD},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return hide_secrets(json.dumps(line, default=str))


def hide_secrets(text: str) -> str:
    """Returns a text with keys and passwords taken out."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


def start_logging(level: int = logging.INFO) -> None:
    """Sends all logs of the process to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("alembic", "httpx", "urllib3", "sqlalchemy"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
