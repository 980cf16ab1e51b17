"""The text that judges the plans of the demo: nothing that calibrates is taken from it."""

import json
import pydoc_data.topics
from pathlib import Path

from runtime.files import write_text

SHORTEST_TOPIC_CHARACTERS = 2000


def python_reference_text() -> list[str]:
    """Returns the longer topics of the Python language reference in this interpreter, sorted by name.

    They are English prose with grammar and program text in between, left as they stand, and differ a little
    from one version of Python to the next.
    """
    topics = sorted(pydoc_data.topics.topics.items())
    return [text for _, text in topics if len(text) >= SHORTEST_TOPIC_CHARACTERS]


def write_reference_text(directory: Path) -> Path:
    """Writes the topics as one JSONL file below a directory, whole or not at all, and returns its path."""
    path = directory / "python-reference.jsonl"
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in python_reference_text()))
    return path
