import gzip
import json
from pathlib import Path

import pytest

from tests.data.extracts import read_extracts, take_extracts, write_extracts
from tests.data.moe_texts import PACKAGE_TEXTS, PARTS, Documents, read_domains

PROSE = {
    "en-US": "The administrator of this machine is the one that has to read which of the files are kept for later.",
    "fr-FR": "Le fichier est dans une archive que les administrateurs des machines ont pour tâche de lire.",
    "de-DE": "Der Rechner und die Dateien sind das, was eine Verwalterin mit den anderen zu pflegen hat.",
}
PAGES = 40


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Documents]:
    root = tmp_path_factory.mktemp("sources")
    _write_dictionary(root / "dictd")
    for language, prose in PROSE.items():
        (root / "html" / language).mkdir(parents=True)
        for page in range(PAGES):
            # The second paragraph of a translation is not translated; the programs are no prose.
            body = f"<h1>{page}</h1><p>{prose} {page}</p><p>{PROSE['en-US']}</p><pre>apt-get {prose}</pre>"
            text = f"<html><head><title>{prose}</title></head><body>{body}</body></html>"
            (root / "html" / language / f"page{page}.html").write_text(text, encoding="utf-8")
    return read_domains(root / "dictd", root / "html")


def _first_package_entry(file: str) -> str:
    return str(json.loads((PACKAGE_TEXTS / file).read_text(encoding="utf-8").partition("\n")[0])["text"])


def _write_dictionary(directory: Path) -> None:
    """Writes a dictionary of three entries, two of them with head words that the package's own texts have."""
    directory.mkdir()
    words = [_first_package_entry(f).partition("\n")[0] for f in ("calibration.jsonl", "selection.jsonl")]
    entries = [f"{word}\n /x/, n.\n\n    A line that\n    is broken.\n\n    Another.\n\n" for word in [*words, "new"]]
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    index, data = ["00-database-info\tA\tB"], b""
    for word, entry in zip([*words, "new"], entries, strict=True):
        encoded = entry.encode()
        place = [digits[n // 64] + digits[n % 64] for n in (len(data), len(encoded))]
        index.append("\t".join([word, *place]))
        data += encoded
    (directory / "jargon.index").write_text("\n".join(index), encoding="utf-8")
    (directory / "jargon.dict.dz").write_bytes(gzip.compress(data))


def test_entries_of_the_package_texts_are_held_out(domains: dict[str, Documents]) -> None:
    heads = {part: [text.partition("\n")[0] for text in domains["jargon"][part]] for part in PARTS}
    assert heads["training"] == ["new"]
    assert heads["calibration"] == [_first_package_entry("calibration.jsonl").partition("\n")[0]]
    assert heads["evaluation"] == [_first_package_entry("selection.jsonl").partition("\n")[0]]
    assert domains["jargon"]["training"] == ["new\n/x/, n.\n\nA line that is broken.\n\nAnother."]


def test_pages_are_prose_in_one_language(domains: dict[str, Documents]) -> None:
    for domain, language in {"french": "fr-FR", "german": "de-DE"}.items():
        texts = [text for part in PARTS for text in domains[domain][part]]
        assert sorted(texts) == sorted(f"{PROSE[language]} {page}" for page in range(PAGES))


def test_a_page_is_in_the_same_part_in_every_language(domains: dict[str, Documents]) -> None:
    for part in PARTS:
        french, german = (
            [text.removeprefix(PROSE[language]) for text in domains[domain][part]]
            for domain, language in {"french": "fr-FR", "german": "de-DE"}.items()
        )
        assert french == german
        assert french


@pytest.mark.parametrize("domain", ["python", "c"])
def test_programs_of_the_interpreter_are_divided_by_file(domains: dict[str, Documents], domain: str) -> None:
    parts = domains[domain]
    assert len(parts["training"]) > len(parts["evaluation"]) > 0
    texts = [text for part in PARTS for text in parts[part]]
    assert len(texts) == len(set(texts))


def test_extracts_end_with_a_line() -> None:
    documents = ["one\ntwo\nthree\n" * 5, "short", "four\nfive\nsix\n" * 5, "never reached " * 9]
    extracts = take_extracts(documents, extract_characters=30, total_characters=50)
    assert extracts == ["one\ntwo\nthree\none\ntwo\nthree", "four\nfive\nsix\nfour\nfive\nsix"]


def test_extracts_are_read_as_written(tmp_path: Path) -> None:
    texts = {"a": ["é\u2028è\n" * 200, "x" * 900], "b": ["y" * 800]}
    write_extracts(texts, tmp_path / "extracts.jsonl")
    assert read_extracts(tmp_path / "extracts.jsonl") == texts
