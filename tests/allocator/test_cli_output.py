"""What libraries print does not get onto stdout, and tables are readable."""

import subprocess
import sys
from pathlib import Path

import pytest

from allocator.cli_output import render, table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("failing", [False, True])
def test_stray_output_goes_to_stderr(failing: bool) -> None:
    code = (
        "import ctypes, os\n"
        "from allocator.cli_output import stray_output_to_stderr\n"
        "libc = ctypes.CDLL(None)\n"
        "print('before')\n"
        "try:\n"
        "    with stray_output_to_stderr():\n"
        "        libc.printf(b'stray from C\\n')\n"
        "        os.write(1, b'stray from the descriptor\\n')\n"
        "        print('stray from Python')\n"
        f"        {'raise ValueError' if failing else 'pass'}\n"
        "except ValueError:\n"
        "    pass\n"
        "print('after')\n"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout == "before\nafter\n"
    assert finished.stderr.count("stray from") == 3


def test_table() -> None:
    rows = [
        {"name": "a", "bytes": 1234567.0, "kl": 0.123456, "shipped": True, "none": None},
        {"name": "longer", "bytes": 5.0, "kl": 2.0, "shipped": False, "none": 3},
    ]
    assert table(rows).splitlines() == [
        "name    bytes    kl       shipped  none",
        "a       1234567  0.12346  yes      -",
        "longer  5        2                 3",
    ]
    assert table([]) == "nothing to show"


def test_numbers_that_json_cannot_hold() -> None:
    document = {"a": [float("inf"), float("nan"), 1.5]}
    assert render(document, True, str) == '{"a": [null, null, 1.5]}'
    assert render(document, False, lambda d: str(len(d))) == "1"
