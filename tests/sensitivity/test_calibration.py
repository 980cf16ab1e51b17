"""Text from every kind of source, its split by document, and the sequences made of it."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from sensitivity.calibration import (
    TokenSequences,
    read_documents,
    sample_sequences,
    split_documents,
    tokenize_documents,
)
from tests.tiny_models import build_tiny_llama, build_tokenizer, sample_text

SHARES = {"calibration": 0.7, "selection": 0.15, "evaluation": 0.15}


def write_lines(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_text_file_is_one_document(tmp_path: Path) -> None:
    assert read_documents(write_lines(tmp_path / "a.txt", "One.", "", "Zwei — ü.")) == ["One.\n\nZwei — ü."]


def test_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "a.txt", "One.")
    assert read_documents("~/a.txt") == ["One."]


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOne.")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "Two."}')
    assert read_documents(str(tmp_path)) == ["One.", "Two."]


def test_each_line_of_jsonl_is_a_document(tmp_path: Path) -> None:
    # U+2028, U+0085 and form feed end a line for str.splitlines, but not for JSON.
    texts = ["One.", "Two\nlines.", "a\u2028b\x85c", "Three."]
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\r\n\n".join(lines).encode() + b"\n")
    assert read_documents(str(path)) == texts


def test_half_a_surrogate_pair_in_jsonl_does_not_break_what_follows(tmp_path: Path) -> None:
    documents = read_documents(write_lines(tmp_path / "a.jsonl", '{"text": "One \\ud83d two"}'))
    assert documents == ["One ? two"]
    assert split_documents(documents, {"all": 1.0}) == {"all": documents}


def test_directory_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write_lines(tmp_path / "b.md", "B")
    write_lines(tmp_path / "a.txt", "A")
    write_lines(tmp_path / "deep" / "c.jsonl", '{"text": "C1"}', '{"text": "C2"}')
    write_lines(tmp_path / "d.txt", "  ", "")
    (tmp_path / "model.bin").write_bytes(b"\0\xff")
    assert read_documents(str(tmp_path)) == ["A", "B", "C1", "C2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff\xfe", r"must be UTF-8 text: got '.*a\.txt' \(invalid start byte at byte 3\)"),
        ("a.txt", b"abc\0def", r"must be text: got '.*a\.txt', which holds NUL bytes"),
        ("a.txt", b" \n\n", r"at least one document: got none in '.*a\.txt'"),
        ("a.jsonl", b"", r"at least one document: got none in"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": ', r"must be JSON: got line 3 of '.*a\.jsonl'"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', r"object with a 'text' string: line 2 of '.*a\.jsonl' is not"),
        ("a.jsonl", b'{"text": 3}', r"object with a 'text' string: line 1"),
        ("a.jsonl", b'["text"]', r"object with a 'text' string: line 1"),
    ],
    ids=["not_utf8", "binary", "blank", "empty", "bad_json", "no_text", "text_is_a_number", "no_object"],
)
def test_file_that_holds_no_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(str(tmp_path / name))


def test_directory_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\0\xff")
    with pytest.raises(ValueError, match="at least one document: got none in"):
        read_documents(str(tmp_path))


def test_missing_path_without_the_package_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"got 'no/such/path', which is no local path, and the package 'datasets'"):
        read_documents("no/such/path")


# Stands in for the network: the package of this name fetches from a hub.
DATASETS = """
class Rows(list):
    def take(self, count):
        return self[:count]

def load_dataset(name, split, streaming):
    if name != "known/text":
        raise ConnectionError("no network")
    return Rows([{"text": "One."}, {"text": None}, {"body": "x"}, {"text": "Two."}])
"""


@pytest.fixture
def fetched_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "datasets.py").write_text(DATASETS, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("fetched_datasets")
def test_dataset_gives_its_text_column() -> None:
    assert read_documents("known/text") == ["One.", "Two."]


@pytest.mark.usefixtures("fetched_datasets")
def test_dataset_that_cannot_be_fetched_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 'no/such', which is no local path and could not be .*ConnectionError"):
        read_documents("no/such")


def make_documents(count: int) -> list[str]:
    return [f"Document {i}. " + sample_text(200 + 37 * (i * 7 % 11)) for i in range(count)]


def share_of(parts: dict[str, list[str]], name: str) -> float:
    return sum(map(len, parts[name])) / sum(len(text) for part in parts.values() for text in part)


@pytest.mark.parametrize("count", [16, 17, 30, 100])
def test_many_documents_are_divided_whole(count: int) -> None:
    documents = make_documents(count)
    parts = split_documents(documents, SHARES)
    assert sorted(itertools.chain.from_iterable(parts.values())) == sorted(documents)
    longest = max(map(len, documents)) / sum(map(len, documents))
    reached = expected = 0.0
    for name, share in SHARES.items():
        reached += share_of(parts, name)
        expected += share
        # The document at the end of a part goes to the side where more of it lies.
        assert abs(reached - expected) <= longest / 2 + 1e-12


def test_split_does_not_depend_on_the_order_of_many() -> None:
    documents = make_documents(40)
    assert split_documents(documents, SHARES) == split_documents(documents[::-1], SHARES)
    # Nor does it follow it: neighbours do not stay together.
    part = split_documents(documents, SHARES)["selection"]
    assert part != [document for document in documents if document in part]


@pytest.mark.parametrize("count", [3, 60], ids=["few", "many"])
def test_equal_documents_are_in_one_part_once(count: int) -> None:
    documents = make_documents(count)
    parts = split_documents(documents * 3, SHARES)
    texts = list(itertools.chain.from_iterable(parts.values()))
    assert len(texts) == len(set(texts))
    assert parts == split_documents(documents, SHARES)


@pytest.mark.parametrize("separator", ["\n\n", "\n", " ", ""], ids=["paragraphs", "lines", "words", "nothing"])
def test_few_long_documents_are_cut_in_order(separator: str) -> None:
    # Words of 5 characters: distinct, so that a piece can be found again.
    documents = [separator.join(f"{k:x}{i:04x}" for i in range(6000)) for k in range(2)]
    parts = split_documents(documents, SHARES)
    assert list(parts) == list(SHARES)
    assert "".join(itertools.chain.from_iterable(parts.values())) == "".join(documents)
    for name, share in SHARES.items():
        # A piece is 2000 to 4000 characters, of 60000 or more.
        assert abs(share_of(parts, name) - share) <= 4000 / sum(map(len, documents))
        if separator:
            last = parts[name][-1]
            assert last.endswith(separator) or last == documents[1][-len(last) :]


def test_cuts_are_at_the_ends_of_paragraphs_where_there_are_any() -> None:
    paragraphs = [sample_text(900 + 10 * i) for i in range(40)]
    [part] = split_documents(["\n\n".join(paragraphs)], {"all": 1.0}).values()
    assert len(part) > 10
    assert [paragraph for piece in part for paragraph in piece.split("\n\n") if paragraph] == paragraphs


def test_long_document_among_many_leaves_no_part_empty() -> None:
    documents = ["\n\n".join(make_documents(200)), *(f"Note {i}." for i in range(40))]
    parts = split_documents(documents, SHARES)
    assert sorted("".join(itertools.chain.from_iterable(parts.values()))) == sorted("".join(documents))
    for name, share in SHARES.items():
        assert abs(share_of(parts, name) - share) <= 4000 / sum(map(len, documents))


def test_one_part_takes_everything() -> None:
    documents = make_documents(5)
    assert split_documents(documents, {"all": 1.0}) == {"all": documents}


def test_windows_lie_evenly_over_the_documents() -> None:
    tokenizer = build_tokenizer()
    documents = [sample_text(900), sample_text(500), sample_text(700)]
    stream = [token for text in documents for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    windows = len(stream) // 16
    sequences = tokenize_documents(documents, tokenizer, sequences=5, sequence_tokens=16, source="here")
    assert sequences.source == "here"
    assert sequences.tokens.dtype == torch.int64
    assert sequences.tokens.shape == (5, 16)
    for i, sequence in enumerate(sequences.tokens.tolist()):
        start = round(i * (windows - 1) / 4) * 16
        assert sequence == stream[start : start + 16]
    whole = tokenize_documents(documents, tokenizer, sequences=windows, sequence_tokens=16, source="here")
    assert whole.tokens.flatten().tolist() == stream[: windows * 16]


@pytest.mark.parametrize("extra", [0, 1, 2, 7])
def test_no_window_is_taken_twice(extra: int) -> None:
    tokenizer = build_tokenizer()
    text = " ".join(str(i) for i in range(1000))
    count = len(tokenizer(text).input_ids) + 1
    windows = count // 16
    sequences = tokenize_documents([text], tokenizer, sequences=windows - extra, sequence_tokens=16, source="here")
    assert len({tuple(sequence) for sequence in sequences.tokens.tolist()}) == windows - extra


def test_tokenizer_without_an_end_of_text_token() -> None:
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    ids = tokenizer("One. Two.").input_ids
    sequences = tokenize_documents(
        ["One. Two."] * 2, tokenizer, sequences=1, sequence_tokens=2 * len(ids), source="here"
    )
    assert sequences.tokens.tolist() == [ids * 2]


def test_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must hold 8 sequences of 64 tokens: got \d+ tokens from 'here'.*Give more"):
        tokenize_documents([sample_text(300)], build_tokenizer(), sequences=8, sequence_tokens=64, source="here")
    with pytest.raises(ValueError, match="got 0 tokens"):
        tokenize_documents([], build_tokenizer(), sequences=2, sequence_tokens=4, source="here")


def test_sampled_text_is_reproducible_by_seed() -> None:
    model, tokenizer = build_tiny_llama().requires_grad_(False), build_tokenizer()
    once, again, other = (
        sample_sequences(model, tokenizer, sequences=5, sequence_tokens=9, seed=seed, batch=2) for seed in (3, 3, 4)
    )
    assert torch.equal(once.tokens, again.tokens)
    assert not torch.equal(once.tokens, other.tokens)
    assert once.tokens.shape == (5, 9) and once.tokens.dtype == torch.int64
    assert len({tuple(sequence) for sequence in once.tokens.tolist()}) == 5
    assert once.source == "sampled from the model, seed 3"
    assert once.fingerprint == again.fingerprint != other.fingerprint


def test_sampled_text_is_what_the_model_finds_likely() -> None:
    model, tokenizer = build_tiny_llama().requires_grad_(False), build_tokenizer()
    model.lm_head.weight.mul_(6)
    tokens = sample_sequences(model, tokenizer, sequences=64, sequence_tokens=16, seed=0).tokens
    start = torch.full((64, 1), tokenizer.bos_token_id)
    log_p = torch.log_softmax(model(torch.cat([start, tokens], dim=1)).logits[:, :-1].double(), dim=-1)
    surprise = -log_p.gather(2, tokens.unsqueeze(2))[..., 0]
    # The surprise of a sampled token has the entropy as its mean and a variance of its own, both known from p.
    entropy = -(log_p.exp() * log_p).sum(-1)
    variance = (log_p.exp() * (log_p + entropy.unsqueeze(-1)) ** 2).sum(-1)
    assert abs((surprise - entropy).sum()) <= 4 * variance.sum().sqrt()
    # Tokens drawn without the model would be more surprising by nats.
    assert entropy.mean() < 4.0


def test_fingerprint_is_that_of_tokens_and_arrangement() -> None:
    tokens = torch.arange(12).reshape(3, 4)
    fingerprint = TokenSequences(tokens=tokens, source="here").fingerprint
    assert fingerprint == TokenSequences(tokens=tokens.clone(), source="there").fingerprint
    assert fingerprint == TokenSequences(tokens=tokens.T.contiguous().T, source="here").fingerprint
    others = (tokens.reshape(4, 3), tokens + 1, tokens[:2])
    assert len({fingerprint, *(TokenSequences(tokens=other, source="here").fingerprint for other in others)}) == 4
