"""The texts that the small mixture of experts is trained on: six domains, divided by document.

================  ==============================================================  ==============================
domain            source                                                          licence
================  ==============================================================  ==============================
``jargon``        The Jargon File 4.4.7, Debian package ``dict-jargon``           public domain
``english``       The Debian Administrator's Handbook, ``debian-handbook``        GPL-2+ or CC-BY-SA-3.0
``french``        its French translation, same package                            GPL-2+ or CC-BY-SA-3.0
``german``        its German translation, same package                            GPL-2+ or CC-BY-SA-3.0
``python``        the standard library of the running interpreter                 PSF-2.0
``c``             the C headers of the running interpreter                        PSF-2.0
================  ==============================================================  ==============================

Without installing the packages: ``apt-get download dict-jargon debian-handbook``, ``dpkg -x FILE DIRECTORY``.

A document goes to one part by the hash of its name; a page of the handbook goes to the same part in every
language, so that no translation of a held-out page is seen. The entries of the Jargon File that the package's own
texts hold (``allocator/texts``) are held out here as well, and so is the whole Python language reference.
"""

import gzip
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

PARTS = ("training", "calibration", "evaluation")
HANDBOOK_LANGUAGES = {"english": "en-US", "french": "fr-FR", "german": "de-DE"}
PACKAGE_TEXTS = Path(__file__).parents[2] / "allocator" / "texts"
SHORTEST_PARAGRAPH_CHARACTERS = 60
# Longer headers are tables made by programs.
LONGEST_HEADER_BYTES = 60_000
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
_STOP_WORDS = {
    "english": {"the", "and", "of", "is", "to", "this", "that", "with", "which", "for"},
    "french": {"le", "la", "les", "des", "et", "est", "une", "que", "pour", "dans"},
    "german": {"der", "die", "das", "und", "ist", "ein", "eine", "zu", "den", "mit"},
}

Documents = dict[str, list[str]]


def read_domains(dictionary: Path, handbook: Path) -> dict[str, Documents]:
    """Returns domain -> part -> documents, each part in the order of the hashes of the documents' names.

    Args:
        dictionary: Directory with ``jargon.dict.dz`` and ``jargon.index`` (/usr/share/dictd once installed).
        handbook: Directory with one folder a language (/usr/share/doc/debian-handbook/html once installed).
    """
    domains = {"jargon": _divide(_read_dictionary(dictionary), held_out=_package_head_words())}
    for domain, language in HANDBOOK_LANGUAGES.items():
        domains[domain] = _divide(_read_handbook(handbook / language, domain))
    paths = sysconfig.get_paths()
    domains["python"] = _divide(_read_programs(Path(paths["stdlib"]), "*.py"))
    domains["c"] = _divide(_read_programs(Path(paths["include"]), "*.h", most_bytes=LONGEST_HEADER_BYTES))
    return domains


def _divide(documents: Iterator[tuple[str, str]], held_out: dict[str, str] | None = None) -> Documents:
    """Divides (name, text) pairs: nine in a hundred evaluate, six calibrate, or as `held_out` says by name."""
    parts: Documents = {part: [] for part in PARTS}
    seen = set()
    for digest, name, text in sorted(
        (hashlib.sha256(name.encode()).hexdigest(), name, text) for name, text in documents
    ):
        if text in seen:
            continue
        seen.add(text)
        share = int(digest[:8], 16) % 100
        by_hash = "evaluation" if share < 9 else "calibration" if share < 15 else "training"
        parts[by_hash if held_out is None else held_out.get(name, "training")].append(text)
    return parts


def _package_head_words() -> dict[str, str]:
    """Returns head word -> part of the Jargon entries that the package carries as texts of its own."""
    parts = {}
    for file, part in {"calibration.jsonl": "calibration", "selection.jsonl": "evaluation"}.items():
        for line in (PACKAGE_TEXTS / file).read_text(encoding="utf-8").split("\n"):
            if line:
                parts[json.loads(line)["text"].partition("\n")[0]] = part
    return parts


def _read_dictionary(directory: Path) -> Iterator[tuple[str, str]]:
    """Yields (head word, entry) of a dictionary in dictd's format, the broken lines of a paragraph joined."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    text = gzip.decompress((directory / "jargon.dict.dz").read_bytes())
    places = set()
    for line in (directory / "jargon.index").read_text(encoding="utf-8").splitlines():
        word, *place = line.split("\t")
        if not word.startswith("00-database"):
            start, length = (sum(digits.index(d) * 64**i for i, d in enumerate(reversed(field))) for field in place)
            places.add((start, length))
    for start, length in sorted(places):
        entry = text[start : start + length].decode("utf-8").strip()
        paragraphs = [" ".join(paragraph.split()) for paragraph in entry.split("\n\n")[1:]]
        head = "\n".join(line.strip() for line in entry.partition("\n\n")[0].splitlines())
        yield head.partition("\n")[0], "\n\n".join([head, *filter(None, paragraphs)])


def _read_handbook(directory: Path, domain: str) -> Iterator[tuple[str, str]]:
    """Yields (page, prose) without the paragraphs that are not translated."""
    for page in sorted(directory.glob("*.html")):
        reader = _ParagraphReader()
        reader.feed(page.read_text(encoding="utf-8"))
        reader.close()
        text = "\n\n".join(p for p in reader.paragraphs if _language(p) == domain)
        if text:
            yield page.name, text


def _language(paragraph: str) -> str:
    words = paragraph.lower().split()
    return max(_STOP_WORDS, key=lambda language: sum(word in _STOP_WORDS[language] for word in words))


def _read_programs(directory: Path, pattern: str, most_bytes: int = 2**30) -> Iterator[tuple[str, str]]:
    """Yields (path below the directory, source), each in UTF-8."""
    for path in sorted(directory.rglob(pattern)):
        name = path.relative_to(directory)
        data = path.read_bytes()
        if _LEFT_OUT.isdisjoint(name.parts) and len(data) <= most_bytes and data.isascii() and data.strip():
            yield str(name), data.decode("ascii")


class _ParagraphReader(HTMLParser):
    """Collects the paragraphs of a page: the text between block elements, programs left out."""

    BLOCKS = frozenset({"div", "p", "h1", "h2", "h3", "h4", "li", "ul", "ol", "td", "dt", "dd", "pre", "body"})
    SKIPPED = frozenset({"head", "script", "style", "pre"})

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._pieces: list[str] = []
        self._skipping = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._skipping += tag in self.SKIPPED
        self._end_paragraph(tag)

    def handle_endtag(self, tag: str) -> None:
        self._end_paragraph(tag)
        self._skipping -= tag in self.SKIPPED

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._pieces.append(data)

    def _end_paragraph(self, tag: str) -> None:
        if tag not in self.BLOCKS:
            return
        paragraph = " ".join("".join(self._pieces).split())
        self._pieces.clear()
        if len(paragraph) >= SHORTEST_PARAGRAPH_CHARACTERS:
            self.paragraphs.append(paragraph)
