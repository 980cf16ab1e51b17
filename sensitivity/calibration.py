"""Calibration text: where it comes from, how it is split, and how it becomes token sequences.

Documents are the unit of splitting: what calibrates never selects a plan, and what selects never evaluates one.
With no text at all the model samples its own, which is the text it assigns the most probability to (the
self-generated calibration of LLM-QAT, Liu et al. 2023, arXiv:2305.17888), by a fixed seed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TEXT_SUFFIXES = {".txt", ".md", ".rst", ".jsonl", ".json", ".html", ".text"}
_FEWEST_DOCUMENTS = 16
_PIECE_CHARACTERS = 2000
_LEAST_PIECE_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True)
class TokenSequences:
    """Sequences of tokens, all of one length.

    Args:
        tokens: [S, T] int64.
        source: Where the text came from, for people.
    """

    tokens: Tensor
    source: str

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens and their arrangement."""
        digest = hashlib.sha256(repr(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.numpy().tobytes())
        return digest.hexdigest()


def read_documents(source: str) -> list[str]:
    """Returns the documents of a text file, a JSONL file, a directory of these, or a Hugging Face dataset.

    Args:
        source: Path or dataset name. A text file is one document; each line of a JSONL file is an object with a
            ``text`` field; a directory is read in the order of its file names.

    Raises:
        ValueError: If there is nothing to read or it is not text.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in _TEXT_SUFFIXES and p.is_file())
        documents = [document for file in files for document in _read_file(file)]
    elif path.is_file():
        documents = _read_file(path)
    else:
        documents = _read_dataset(source)
    documents = [document for document in documents if document.strip()]
    if not documents:
        msg = f"calibration text must hold at least one document: got none in '{source}'. Give .txt or .jsonl files."
        raise ValueError(msg)
    return documents


def split_documents(documents: Sequence[str], shares: Mapping[str, float]) -> dict[str, list[str]]:
    """Returns the distinct documents divided into named parts, each document in one.

    Documents are ordered by the hash of their content, so the split does not depend on file order. Fewer than 16
    documents keep their order and are cut into pieces first, at the ends of paragraphs where there are any; so is
    a document longer than the smallest part. The pieces stay together: two parts meet in one place only.

    Args:
        documents: Texts.
        shares: Part -> share of all characters; the shares sum to one.
    """
    distinct = list(dict.fromkeys(documents))
    total = sum(map(len, distinct))
    longest = 0.0
    if len(distinct) >= _FEWEST_DOCUMENTS:
        distinct.sort(key=lambda document: hashlib.sha256(document.encode()).digest())
        longest = min(shares.values()) * total
    # Of a short text smaller pieces, so that every part gets some.
    least = max(_LEAST_PIECE_CHARACTERS, min(_PIECE_CHARACTERS, int(min(shares.values()) * total / 4)))
    ordered = [
        piece for document in distinct for piece in (_cut(document, least) if len(document) > longest else [document])
    ]
    parts: dict[str, list[str]] = {name: [] for name in shares}
    names, bounds, reached = list(shares), [], 0.0
    for share in shares.values():
        reached += share
        bounds.append(reached * total)
    position = 0
    for document in ordered:
        middle = position + len(document) / 2
        index = next((i for i, bound in enumerate(bounds) if middle < bound), len(bounds) - 1)
        parts[names[index]].append(document)
        position += len(document)
    return parts


def tokenize_documents(
    documents: Sequence[str], tokenizer: Any, *, sequences: int, sequence_tokens: int, source: str
) -> TokenSequences:
    """Returns ``sequences`` sequences cut evenly from the documents.

    The documents are joined by the end-of-text token and cut into windows; the windows taken lie evenly over the
    whole text.

    Raises:
        ValueError: If the text is too short.
    """
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    for document in documents:
        stream.extend(tokenizer(document, add_special_tokens=False).input_ids)
        stream.extend(separator)
    windows = len(stream) // sequence_tokens
    if windows < sequences:
        msg = (
            f"text must hold {sequences} sequences of {sequence_tokens} tokens: got {len(stream)} tokens from "
            f"'{source}'. Give more text, or ask for fewer or shorter sequences."
        )
        raise ValueError(msg)
    starts = torch.linspace(0, windows - 1, sequences, dtype=torch.float64).round().to(torch.int64) * sequence_tokens
    tokens = torch.stack([torch.tensor(stream[i : i + sequence_tokens]) for i in starts.tolist()])
    return TokenSequences(tokens=tokens, source=source)


def read_sequences(
    source: str, tokenizer: Any, *, sequences: int | None, sequence_tokens: int, most_sequences: int = 32
) -> TokenSequences:
    """Returns sequences of a text source, as many as are asked for, or as it holds up to ``most_sequences``.

    Raises:
        ValueError: If the text is missing or too short, or fewer than 2 sequences are asked for.
    """
    if sequences is not None and sequences < 2:
        msg = f"sequences must be at least 2 (an interval needs two samples): got {sequences}. Raise it."
        raise ValueError(msg)
    documents = read_documents(source)
    if sequences is None:
        total = sum(len(tokenizer(document, add_special_tokens=False).input_ids) for document in documents)
        sequences = max(2, min(most_sequences, total // sequence_tokens))
    return tokenize_documents(documents, tokenizer, sequences=sequences, sequence_tokens=sequence_tokens, source=source)


def sample_sequences(
    model: Any, tokenizer: Any, *, sequences: int, sequence_tokens: int, seed: int, batch: int = 16
) -> TokenSequences:
    """Returns sequences that the model samples from itself at temperature 1, from its begin-of-text token.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        sequences: S.
        sequence_tokens: T, without the begin token.
        seed: Seed of the sampling.
        batch: Sequences sampled together.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for first in range(0, sequences, batch):
        tokens = torch.full((min(batch, sequences - first), 1), start if start is not None else 0)
        drawn.append(_sample_batch(model, tokens, sequence_tokens, generator))
    return TokenSequences(tokens=torch.cat(drawn)[:, 1:], source=f"sampled from the model, seed {seed}")


@torch.no_grad()
def _sample_batch(model: Any, tokens: Tensor, length: int, generator: torch.Generator) -> Tensor:
    cache = None
    for _ in range(length):
        output = model(tokens[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probabilities = torch.softmax(output.logits[:, -1].float(), dim=-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    return tokens


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        msg = f"calibration files must be UTF-8 text: got '{path}' ({error.reason} at byte {error.start}). Convert it."
        raise ValueError(msg) from error
    if "\0" in text:
        msg = f"calibration files must be text: got '{path}', which holds NUL bytes. Name a text file."
        raise ValueError(msg)
    if path.suffix != ".jsonl":
        return [text]
    # Not splitlines: JSON strings may hold U+2028 and other characters that it takes for the end of a line.
    return [_document(line, path, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _document(line: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        msg = f"each line of a JSONL file must be JSON: got line {number} of '{path}' ({error.msg}). Correct the line."
        raise ValueError(msg) from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        msg = f"each line of a JSONL file must be an object with a 'text' string: line {number} of '{path}' is not."
        raise ValueError(msg)
    # JSON can name half a surrogate pair, which no encoding of text holds.
    return str(record["text"]).encode("utf-8", errors="replace").decode("utf-8")


def _read_dataset(name: str, most_documents: int = 2000) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        msg = (
            f"calibration must be a path or a Hugging Face dataset: got '{name}', which is no local path, and the "
            "package 'datasets' is not installed. Check the path, or install bitplan[datasets]."
        )
        raise ValueError(msg) from error
    try:
        rows = load_dataset(name, split="train", streaming=True)
        return [row["text"] for row in rows.take(most_documents) if isinstance(row.get("text"), str)]
    except Exception as error:  # the library raises its own, its file systems' and the hub's exceptions
        msg = (
            f"calibration must be a path or a Hugging Face dataset with a 'text' column: got '{name}', which is no "
            f"local path and could not be fetched ({type(error).__name__}). Check the spelling."
        )
        raise ValueError(msg) from error


def _cut(document: str, least_characters: int) -> list[str]:
    pieces = []
    start = 0
    while len(document) - start > 2 * least_characters:
        stop = start + least_characters
        window = document[stop : stop + least_characters]
        # The empty string is in every window, at its start: text without any space is cut where it stands.
        end = next(end for end in ("\n\n", "\n", " ", "") if end in window)
        stop += window.index(end) + len(end)
        pieces.append(document[start:stop])
        start = stop
    return [*pieces, document[start:]]
