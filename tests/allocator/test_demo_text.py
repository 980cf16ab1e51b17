"""The texts of the package: documents enough, and none that both calibrates and judges."""

import json
from importlib import resources

import pytest

from allocator.demo_text import python_reference_text


def read_committed(name: str) -> list[str]:
    path = resources.files("allocator") / "texts" / name
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("name", "least_characters"), [("calibration.jsonl", 240_000), ("selection.jsonl", 58_000)])
def test_committed_texts_are_long_prose(name: str, least_characters: int) -> None:
    texts = read_committed(name)
    assert sum(map(len, texts)) >= least_characters
    assert all(len(text) > 400 and text == text.strip() for text in texts)
    assert not any(mark in text for text in texts for mark in ("  ", "\n\n\n", "\t"))


def test_no_document_is_in_two_sets() -> None:
    calibration, selection = read_committed("calibration.jsonl"), read_committed("selection.jsonl")
    documents = [*calibration, *selection, *python_reference_text()]
    assert len(set(documents)) == len(documents)
    head_words = [{text.partition("\n")[0] for text in texts} for texts in (calibration, selection)]
    assert not head_words[0] & head_words[1]


def test_python_reference_is_long_and_stable() -> None:
    texts = python_reference_text()
    assert all(len(text) >= 2000 for text in texts)
    # More than 2,000 tokens of four characters, many times over, from more than a few topics.
    assert len(texts) >= 30
    assert sum(map(len, texts)) >= 200_000
    assert texts == python_reference_text()
