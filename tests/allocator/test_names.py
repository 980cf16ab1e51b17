"""The package's table of contents."""

import subprocess
import sys
from pathlib import Path

import pytest

import allocator


def test_every_name_is_there() -> None:
    for name in allocator.__all__:
        assert getattr(allocator, name) is not None
    assert dir(allocator) == sorted(allocator.__all__)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'quantise'\. It has .*measure"):
        allocator.quantise  # noqa: B018


def test_verbs_stay_functions_after_every_module_was_imported() -> None:
    code = (
        "import importlib, pkgutil, types, allocator\n"
        "for module in pkgutil.iter_modules(allocator.__path__):\n"
        "    importlib.import_module(f'allocator.{module.name}')\n"
        "print(sorted(n for n in allocator.__all__ if isinstance(getattr(allocator, n), types.ModuleType)))\n"
        "print(allocator.plan.__module__)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert finished.stdout.splitlines() == ["[]", "allocator.plan_query"]
