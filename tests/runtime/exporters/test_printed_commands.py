"""The commands that exports print run as they are printed, in a shell, where the engine is installed."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from runtime.engines import ENGINES
from runtime.exporters import export
from runtime.formats import find_format
from runtime.loading import ReferenceModel, load_reference
from runtime.units import find_units, list_weights
from tests.tiny_models import build_tiny_llama, sample_text, save_model

# Each starts a process that imports a whole engine, and GPTQModel compiles a kernel.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# Engine -> the module that must be installed, and what the command leaves behind where that is not text.
ENGINES_AT_HAND = {
    "transformers": ("compressed_tensors", None),
    "mlx-lm": ("mlx_lm", None),
    "onnxruntime": ("onnxruntime", None),
    "openvino": ("openvino", None),
    "torchao": ("torchao", None),
    "auto-round": ("auto_round", "quantized"),
    "gptqmodel": ("gptqmodel", "quantized"),
}


def legal_formats(reference: ReferenceModel, engine_name: str) -> dict[str, str]:
    """Returns the formats of an engine's menu in turn, one a unit, as far as they fit."""
    engine, weights = ENGINES[engine_name], list_weights(reference.model)
    formats = {}
    for i, unit in enumerate(find_units(reference.model, fuse=engine.fusions(weights))):
        fitting = [
            name
            for name in engine.menu
            if engine.refusal(unit, find_format(name)) is None
            and all(find_format(name).fits(weight.shape[1]) for weight in unit.weights)
        ]
        formats |= {weight.name: fitting[i % len(fitting)] for weight in unit.weights}
    return formats


@pytest.mark.parametrize("engine", ENGINES_AT_HAND)
def test_the_command_runs(engine: str, tmp_path: Path) -> None:
    module, leaves = ENGINES_AT_HAND[engine]
    if find_spec(module) is None:
        pytest.skip(f"needs {module}: make engines")
    reference = load_reference(str(save_model(build_tiny_llama(), tmp_path / "model")))
    export(reference, legal_formats(reference, engine), tmp_path / "out", exporter=ENGINES[engine].exporter)
    text = sample_text(4000)
    (tmp_path / "calibration.txt").write_text("\n".join(text[i : i + 400] for i in range(0, 4000, 400)))
    command = ENGINES[engine].command.format(out=tmp_path / "out", model=tmp_path / "model")
    # `python` and the scripts of packages are those of this environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(
        command, shell=True, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() if leaves is None else list((tmp_path / "out" / leaves).rglob("config.json"))
