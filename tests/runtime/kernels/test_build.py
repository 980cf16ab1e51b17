"""Making the library, and what happens where it cannot be made; on a copy of the package, with real compilers."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import runtime
from runtime.kernels import build

PACKAGE = Path(runtime.__file__).parent


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The package ``runtime`` without any library."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "runtime", ignore=shutil.ignore_patterns("*.so", "__pycache__")))


def load_build(package: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("copied_build", package / "kernels" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_library_is_named_after_its_sources(copied: Path) -> None:
    module = load_build(copied)
    name = module.library_path().name
    assert name == build.library_path().name
    with (copied / "kernels" / "cpu" / "entry.cpp").open("a") as stream:
        stream.write("// changed\n")
    assert module.library_path().name != name


def test_sources_that_do_not_compile_are_reported(copied: Path) -> None:
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler is here")
    module = load_build(copied)
    for source in (copied / "kernels" / "cpu").glob("*.cpp"):
        source.write_text("#error no kernels\n")
    with pytest.raises(module.CompilationFailed, match=r"(?s)must accept the CPU kernels.*no kernels"):
        module.compile_library(module.library_path())
    assert not list((copied / "kernels" / "cpu").glob("*.part"))


def test_a_place_that_is_not_there_is_reported(copied: Path) -> None:
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler is here")
    module = load_build(copied)
    with pytest.raises(module.CompilationFailed, match="directory must be writable"):
        module.compile_library(copied / "missing" / "library.so")


def test_without_a_compiler_the_reference_runs_and_says_so(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load_build(copied)
    monkeypatch.setenv("PATH", str(copied))
    with pytest.raises(module.CompilationFailed, match="no C\\+\\+ compiler was found"):
        module.compile_library(module.library_path())
    code = (
        "import torch\n"
        "from runtime.apply import pack_weight\n"
        "from runtime.formats import FORMATS\n"
        "from runtime.packed import QuantizedLinear\n"
        "linear = QuantizedLinear(pack_weight(torch.eye(64), FORMATS['int4_g64']))\n"
        "x = torch.randn(3, 64)\n"
        "assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight()))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(copied.parent), "PATH": str(copied)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=copied.parent, env=environment, capture_output=True, text=True, check=True)
    assert run.stderr.count("packed weights run on the slow reference path") == 1
    assert "no C++ compiler was found" in run.stderr
