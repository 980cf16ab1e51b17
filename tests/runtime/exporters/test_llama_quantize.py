"""llama-quantize itself reads what we write for it: the importance matrix and the list of tensor types.

Runs where LLAMA_CPP_BIN names the directory of the program, or the path has it; how to build it, in
benchmarks/llama_cpp_tools.py.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from transformers import PreTrainedModel

from runtime.engines import find_engine
from runtime.exporters import export
from runtime.loading import ReferenceModel, load_reference
from runtime.units import list_weights
from tests.runtime.exporters.test_gguf_imatrix import write
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral, build_wide_llama, save_model

QUANTIZE = shutil.which("llama-quantize", path=os.environ.get("LLAMA_CPP_BIN", "") + os.pathsep + os.environ["PATH"])

pytestmark = pytest.mark.skipif(QUANTIZE is None, reason="needs llama-quantize: set LLAMA_CPP_BIN")


def quantize(reference: ReferenceModel, out: Path, base_type: str, *options: str) -> str:
    """Returns what llama-quantize prints when it makes a file out of a model's unquantized one."""
    plain = out.with_suffix(".f16")
    export(reference, dict.fromkeys(list_weights(reference.model), "fp16"), plain, exporter="llama.cpp")
    command = [str(QUANTIZE), *options, str(plain / "model.gguf"), str(out), base_type, "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("build", [build_tiny_llama, build_tiny_mixtral], ids=["llama", "mixtral"])
def test_it_uses_our_importance_matrix(build: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    reference = load_reference(str(save_model(build(), tmp_path / "model")))
    found = write(reference, tmp_path / "imatrix.gguf")
    text = quantize(reference, tmp_path / "out.gguf", "Q4_0", "--imatrix", str(tmp_path / "imatrix.gguf"))
    assert f"have {len(found) // 2} importance matrix entries" in text
    assert "did not find weights for blk" not in text
    quantize(reference, tmp_path / "plain.gguf", "Q4_0")
    weighted, plain = (
        {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / name).tensors}
        for name in ("out.gguf", "plain.gguf")
    )
    down = next(name for name in plain if "ffn_down" in name)
    assert not np.array_equal(weighted[down], plain[down])


def test_it_makes_the_planned_types_under_a_quantized_base_type(tmp_path: Path) -> None:
    # Rows of 256 and 512, which all blocks divide.
    model = build_wide_llama(256, 512, layers=2)
    reference = load_reference(str(save_model(model, tmp_path / "model")))
    menu = ("q4_k", "iq4_nl", "q6_k", "q5_1", "iq4_xs", "q8_0", "q3_k", "bf16")
    formats = {name: menu[i % len(menu)] for i, name in enumerate(list_weights(reference.model))}
    export(reference, formats, tmp_path / "ours", exporter="llama.cpp")
    ours = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "ours" / "model.gguf").tensors}
    for base_type, kept in (("Q4_0", True), ("F16", False)):
        options = ("--tensor-type-file", str(tmp_path / "ours" / "tensor-types.txt"))
        text = quantize(reference, tmp_path / f"{base_type}.gguf", base_type, *options)
        theirs = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / f"{base_type}.gguf").tensors}
        # Under the base type F16 the list is ignored without a word, as the engine's notes say.
        assert (theirs == ours) == kept
        assert "falling back" not in text


def test_what_it_stores_where_rows_do_not_divide_is_what_the_rules_say(tmp_path: Path) -> None:
    # Rows of 96. The rules refuse such pairs before the solve, so that no plan of ours asks for them.
    model = build_wide_llama(96, 192, layers=1)
    reference = load_reference(str(save_model(model, tmp_path / "model")))
    llama_cpp = find_engine("llama.cpp")
    names = [f"blk.0.{part}.weight" for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up")]
    asked = dict(zip(names, llama_cpp.instead, strict=True))
    lines = [f"^{re.escape(name)}$={type_name}\n" for name, type_name in asked.items()]
    (tmp_path / "types.txt").write_text("".join([*lines, "weight=q8_0\n"]))
    quantize(reference, tmp_path / "out.gguf", "Q8_0", "--tensor-type-file", str(tmp_path / "types.txt"))
    found = {t.name: t.tensor_type.name.lower() for t in GGUFReader(tmp_path / "out.gguf").tensors}
    assert {name: found[name] for name in names} == {name: llama_cpp.instead[t] for name, t in asked.items()}
