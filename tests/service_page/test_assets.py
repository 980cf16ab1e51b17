"""The built page in the package is that of the sources, small, and asks no other machine for anything."""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "frontend"
BUILT = ROOT / "allocator" / "service" / "page"
# As in frontend/source_hash.ts.
FILES = ("index.html", "package-lock.json", "package.json", "source_hash.ts", "tsconfig.json", "vite.config.ts")
MOST_BYTES = 300_000


def hash_sources() -> str:
    below = [path.relative_to(SOURCES).as_posix() for path in (SOURCES / "src").rglob("*") if path.is_file()]
    digest = hashlib.sha256()
    for name in sorted([*FILES, *below]):
        digest.update(f"{name}\0".encode() + (SOURCES / name).read_bytes() + b"\0")
    return digest.hexdigest()


def test_built_from_these_sources() -> None:
    assert (BUILT / "sources.sha256").read_text().strip() == hash_sources(), "run: make page"


def test_small_and_complete() -> None:
    files = [path for path in BUILT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    page = (BUILT / "index.html").read_text()
    named = re.findall(r'(?:src|href)="/([^"]+)"', page)
    assert len(named) == 3
    for name in named:
        assert (BUILT / name).is_file()


def test_nothing_inline_and_nothing_from_elsewhere() -> None:
    page = (BUILT / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", page)
    texts = [page, *(path.read_text() for path in (BUILT / "assets").iterdir())]
    # Names of namespaces are no addresses to fetch.
    addresses = {found for text in texts for found in re.findall(r"https?://[^\s\"'`)<]+", text)}
    assert {address for address in addresses if "www.w3.org/" not in address} == set()
    assert not any(re.search(r"@import|\beval\(|new Function\(", text) for text in texts)
    # What comes from the service becomes text nodes alone.
    sources = [path.read_text() for path in (SOURCES / "src").rglob("*.ts*")]
    assert not any(re.search(r"innerHTML|insertAdjacentHTML|document\.write|srcdoc", text) for text in sources)


def test_a_new_build_is_the_same(tmp_path: Path) -> None:
    if shutil.which("npm") is None or not (SOURCES / "node_modules").is_dir():
        pytest.skip("node and the page's tools are not installed here (make page installs them)")
    command = ["npm", "run", "--silent", "build", "--", "--outDir", str(tmp_path / "page")]
    subprocess.run(command, cwd=SOURCES, check=True, capture_output=True)
    built = {path.relative_to(BUILT): path.read_bytes() for path in BUILT.rglob("*") if path.is_file()}
    again = tmp_path / "page"
    assert {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()} == built
