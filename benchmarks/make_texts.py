"""Makes the committed texts from the Debian package dict-jargon.

    python benchmarks/make_texts.py /usr/share/dictd allocator/texts

The package holds the Jargon File as a dictionary: an index of words with positions, and one gzip file of
entries with a head word, a line of pronunciation, and paragraphs broken into short indented lines. Each prose
entry becomes one JSON line. The entries are put in the order of a hash of their head words; the first ones go
to selection.jsonl, the following ones to calibration.jsonl, so no entry is in both.
"""

import gzip
import hashlib
import json
import re
import sys
from pathlib import Path

SELECTION_BYTES = 60_000
CALIBRATION_BYTES = 250_000
SHORTEST_ENTRY_CHARACTERS = 400
DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


def decode_number(word: str) -> int:
    """Returns the number that the index writes in base 64, most significant digit first."""
    number = 0
    for digit in word:
        number = 64 * number + DIGITS.index(digit)
    return number


def read_entries(directory: Path) -> list[str]:
    """Returns each entry of the dictionary once, as it is written there."""
    text = gzip.decompress((directory / "jargon.dict.dz").read_bytes())
    index = (directory / "jargon.index").read_text(encoding="utf-8")
    places = set()
    for line in index.splitlines():
        word, start, length = line.split("\t")
        if not word.startswith("00-database"):
            places.add((decode_number(start), decode_number(length)))
    return [text[start : start + length].decode("utf-8") for start, length in sorted(places)]


def reflow(entry: str) -> str | None:
    """Returns the entry as a head word and paragraphs of one line each, or None if it is not plain prose."""
    head_word, _, rest = entry.partition("\n")
    # What follows up to the first empty line is pronunciation and part of speech.
    body = rest.partition("\n\n")[2]
    paragraphs = [paragraph for paragraph in re.split(r"\n\s*\n", body) if paragraph.strip()]
    if not all(is_prose(paragraph) for paragraph in paragraphs):
        return None
    return "\n\n".join([head_word.strip(), *map(join_lines, paragraphs)])


def is_prose(paragraph: str) -> bool:
    """Tells paragraphs from verse, programs (both indented further than the body) and framed tables."""
    return all(re.match(r" {4}[^\s┌│├└]", line) for line in paragraph.strip("\n").splitlines())


def join_lines(paragraph: str) -> str:
    """Returns the paragraph on one line, without the braces of cross-references."""
    text = " ".join(paragraph.split())
    # Lines were broken after an opening and before a closing bracket as well.
    text = re.sub(r"([{(\[“‘]) ", r"\1", text)
    text = re.sub(r" ([})\],.;:”])", r"\1", text)
    return re.sub(r"{([^{}]+)}", r"\1", text)


def order_key(text: str) -> str:
    head_word = text.partition("\n")[0]
    return hashlib.sha256(head_word.encode()).hexdigest()


def write_documents(path: Path, texts: list[str]) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(texts)} documents, {path.stat().st_size} bytes")


def take(texts: list[str], size_bytes: int) -> list[str]:
    """Removes documents from the front of `texts` until they fill `size_bytes`, and returns them."""
    taken: list[str] = []
    while sum(len(text.encode()) for text in taken) < size_bytes:
        taken.append(texts.pop(0))
    return taken


def main(dictionary: Path, out: Path) -> None:
    reflowed = {text for entry in read_entries(dictionary) if (text := reflow(entry))}
    texts = sorted((text for text in reflowed if len(text) > SHORTEST_ENTRY_CHARACTERS), key=order_key)
    write_documents(out / "selection.jsonl", take(texts, SELECTION_BYTES))
    write_documents(out / "calibration.jsonl", take(texts, CALIBRATION_BYTES))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
