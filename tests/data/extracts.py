"""Extracts of held-out documents, in the repository beside the model, and their tokens.

A line of a file is a JSON object with ``domain`` and ``text``, which whatever reads JSONL texts can read.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EXTRACT_CHARACTERS, EXTRACTS_CHARACTERS = 3_000, 15_000  # of one document, of one domain


def write_extracts(documents: Mapping[str, Sequence[str]], path: Path) -> None:
    """Writes extracts of the documents (domain -> texts)."""
    lines = [
        json.dumps({"domain": domain, "text": text}, ensure_ascii=False) + "\n"
        for domain, texts in documents.items()
        for text in take_extracts(texts, extract_characters=EXTRACT_CHARACTERS, total_characters=EXTRACTS_CHARACTERS)
    ]
    path.write_text("".join(lines), encoding="utf-8")


def read_extracts(path: Path) -> dict[str, list[str]]:
    """Returns domain -> extracts of a file."""
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            found.setdefault(row["domain"], []).append(row["text"])
    return found


def take_extracts(documents: Sequence[str], *, extract_characters: int, total_characters: int) -> list[str]:
    """Returns the beginnings of documents, cut at ends of lines, until they reach a total length."""
    extracts: list[str] = []
    for document in documents:
        if sum(map(len, extracts)) >= total_characters:
            break
        extract = document[:extract_characters]
        if len(document) > extract_characters:
            extract = extract[: extract.rfind("\n") + 1 or extract.rfind(" ") + 1].rstrip()
        if len(extract) >= extract_characters / 4:
            extracts.append(extract)
    return extracts


def encode(tokenizer: Any, documents: Sequence[str]) -> Tensor:
    """Returns the tokens of all documents, the end-of-text token after each."""
    ends = [tokenizer.eos_token_id]
    return torch.tensor([token for ids in tokenizer(list(documents)).input_ids for token in ids + ends])


def cut_sequences(stream: Tensor, sequence_tokens: int) -> Tensor:
    """Returns the whole sequences [S, T] of a stream of tokens."""
    return stream[: len(stream) // sequence_tokens * sequence_tokens].view(-1, sequence_tokens)


def count_bytes(tokenizer: Any, tokens: Tensor) -> int:
    """Returns the number of bytes of text that tokens stand for: a letter of a byte-level token is a byte."""
    special = set(tokenizer.all_special_tokens)
    names = tokenizer.convert_ids_to_tokens(tokens.flatten().tolist())
    return sum(len(name) for name in names if name not in special)
