"""Runs the command of an installed bitplan on a tiny model, from the directory it is started in.

`tests/wheel_check.sh` starts it with an interpreter that has the wheel and nothing of the repository: only
this script's own directory is on the path, for `tiny_models`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tiny_models import sample_text, save_tiny_llama


def run_bitplan(*arguments: str, expected_exit: int = 0) -> str:
    """Returns the standard output of `bitplan ARGUMENTS` after checking its exit code."""
    command = Path(sys.executable).with_name("bitplan")
    finished = subprocess.run([str(command), *arguments], capture_output=True, text=True, check=False)
    assert finished.returncode == expected_exit, (
        f"bitplan {' '.join(arguments)} ended with {finished.returncode}, not {expected_exit}:\n"
        f"{finished.stdout}\n{finished.stderr}"
    )
    return finished.stdout


def check_installed_package() -> None:
    """Checks that the package comes from the environment, with its data files."""
    import allocator
    import reports

    required = [(allocator, "texts/calibration.jsonl"), (allocator, "service/page/index.html"), (reports, "templates")]
    for package, data in required:
        assert package.__file__ is not None
        folder = Path(package.__file__).parent
        assert folder.is_relative_to(sys.prefix), f"{package.__name__} is not the installed one: {folder}"
        assert (folder / data).exists(), f"the wheel lacks {package.__name__}/{data}"


def check_compiled_kernels() -> None:
    """Checks that the wheel holds the compiled kernels if it was built where a compiler is."""
    from runtime.kernels.build import find_compiler, library_path
    from runtime.kernels.cpu import load_kernels

    if find_compiler() is not None:
        assert library_path().exists(), "the wheel lacks the compiled kernels, although a compiler is here"
        assert load_kernels() is not None


def check_commands(directory: Path) -> None:
    """Takes a tiny model from measurement to text and report, by the commands alone."""
    model = save_tiny_llama(directory / "model")
    calibration = directory / "calibration.txt"
    calibration.write_text(sample_text(6000), encoding="utf-8")
    plan, packed, page = directory / "plan.json", directory / "packed", directory / "report"
    amounts = {"--sequences": 4, "--sequence-tokens": 16, "--logit-sequences": 2, "--logit-tokens": 16}
    amounts |= {"--held-out-sequences": 2, "--held-out-tokens": 32}
    flags = [str(part) for amount in amounts.items() for part in amount]
    run_bitplan("measure", str(model), "--calibration", str(calibration), *flags)
    printed = run_bitplan("plan", str(model), "--bits-per-weight", "6", "--out", str(plan), "--json")
    for document in (printed, plan.read_text(encoding="utf-8")):
        assert isinstance(json.loads(document), dict), document
    run_bitplan("apply", str(model), "--plan", str(plan), "--out", str(packed))
    assert list(packed.glob("*.safetensors")), "apply wrote no safetensors file"
    assert run_bitplan("generate", str(packed), "--prompt", "The compiler"), "generate printed nothing"
    run_bitplan("report", str(model), "--plan", str(plan), "--out", str(page))
    assert list(page.glob("*.html")), "report wrote no page"
    assert list(page.glob("*.csv")), "report wrote no table"
    run_bitplan("plan", str(model), "--bits-per-weight", "0.1", expected_exit=3)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")
        check_installed_package()
        check_compiled_kernels()
        check_commands(Path(scratch))


if __name__ == "__main__":
    main()
