"""Prints a page to PDF with a Chromium that is installed: found by name, run without network, one process, one file."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from reports.atomic_files import write_bytes_atomically

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
MOST_SECONDS = 120


class PrintingFailed(Exception):
    """A browser was found and did not print."""


def find_browser() -> str:
    """Returns the path of the first of `BROWSERS` that is installed.

    Raises:
        ModuleNotFoundError: if none is.
    """
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        msg = (
            f"a PDF is printed by Chromium: got none of {', '.join(BROWSERS)} on the PATH. Install one of them (on "
            "Debian, the package chromium), or leave the PDF out."
        )
        raise ModuleNotFoundError(msg)
    return found


def print_to_pdf(html: str, path: Path) -> Path:
    """Prints a self-contained page to a PDF file, atomically, and returns its path.

    Raises:
        ModuleNotFoundError: if no browser is installed.
        PrintingFailed: if the browser fails, or takes longer than `MOST_SECONDS`.
    """
    browser = find_browser()
    # Beside the target: a browser in a container of its own may see nothing of the system's temporary directory.
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="printing-", ignore_cleanup_errors=True) as scratch:
        page, printed = Path(scratch) / "page.html", Path(scratch) / "page.pdf"
        page.write_text(html, encoding="utf-8", errors="backslashreplace")
        command = [
            browser,
            "--headless",
            "--disable-gpu",
            "--no-first-run",
            "--no-pdf-header-footer",
            # Root may not have the browser's sandbox; the page loads nothing and runs only our scripts.
            *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []),
            f"--user-data-dir={Path(scratch) / 'profile'}",
            f"--print-to-pdf={printed}",
            page.resolve().as_uri(),
        ]
        problem = _run(command)
        if not printed.is_file():
            msg = f"the browser must print the page: '{browser}' wrote nothing ({problem}). Leave the PDF out."
            raise PrintingFailed(msg)
        write_bytes_atomically(path, printed.read_bytes())
    return path


def _run(command: list[str]) -> str:
    """Runs a command and returns the last line of what it says to stderr."""
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {MOST_SECONDS} s"
    said = finished.stderr.strip().splitlines()
    return f"exit code {finished.returncode}" + (f", {said[-1]}" if said else "")
