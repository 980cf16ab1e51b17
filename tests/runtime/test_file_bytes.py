"""Bytes of weights in engines' files: the files that exporters write are as long as was counted before."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from runtime.exporters import EXPORTERS, FIXED_BYTES, export
from runtime.file_bytes import EXPORTED_BYTES, weight_bytes
from runtime.formats import find_format
from runtime.loading import load_reference
from runtime.units import Weight, list_weights
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral, build_tiny_qwen_moe, save_model

VLLM = "compressed-tensors for vLLM"
# Exporter -> formats in turn; widths whose rows end within a word, zero points, unquantized ones.
MENUS = {
    "compressed-tensors": (
        "int2_g64_sym",
        "int3_channel_sym",
        "int5_g32_sym",
        "bf16",
        "int7_g16_sym",
        "int8_channel_sym",
    ),
    VLLM: ("int4_g32", "int8_g64_sym", "int4_channel", "fp16", "int4_g64_sym", "int4_channel_sym"),
    "mlx-lm": ("int2_g64", "int3_g32_sym", "int6_g32", "bf16", "int5_g64_sym", "int8_g64"),
}
FILE = {"llama.cpp": "model.gguf", "onnx": "model.onnx.data"}


def test_who_adds_bytes_is_an_exporter_whose_file_is_known() -> None:
    assert set(EXPORTED_BYTES) <= set(FIXED_BYTES) <= set(EXPORTERS)
    assert set(EXPORTED_BYTES) == set(MENUS)


@pytest.mark.parametrize("exporter", MENUS)
@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("turn", range(3))
def test_files_are_as_long_as_counted(exporter: str, tied: bool, turn: int, tmp_path: Path) -> None:
    reference = load_reference(str(save_model(build_tiny_llama(tied=tied, attention_bias=True), tmp_path / "model")))
    menu, weights = MENUS[exporter], list_weights(reference.model)
    unquantized = () if exporter == "mlx-lm" else ("embedding", "head")
    formats = {
        name: "bf16" if weight.kind in unquantized else menu[(i * (turn + 1)) % len(menu)]
        for i, (name, weight) in enumerate(weights.items())
    }
    export(reference, formats, tmp_path / "out", exporter=exporter)
    stored = sum(weight_bytes(weight, find_format(formats[name]), exporter) for name, weight in weights.items())
    expected = stored + FIXED_BYTES[exporter](reference)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == expected


@pytest.mark.parametrize("build", [build_tiny_mixtral, build_tiny_qwen_moe], ids=["mixtral", "qwen2 mixture"])
@pytest.mark.parametrize("experts", ["int4_g32", "int4_channel_sym", "bf16"])
def test_files_of_mixtures_are_as_long_as_counted(
    build: Callable[[], PreTrainedModel], experts: str, tmp_path: Path
) -> None:
    reference = load_reference(str(save_model(build(), tmp_path / "model")))
    weights = list_weights(reference.model)
    formats = {
        name: {"expert": experts if "layers.0" in name else "fp16", "embedding": "fp16"}.get(w.kind, "int8_g32_sym")
        for name, w in weights.items()
    }
    export(reference, formats, tmp_path / "out", exporter=VLLM)
    stored = sum(weight_bytes(weight, find_format(formats[name]), VLLM) for name, weight in weights.items())
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == stored + FIXED_BYTES[VLLM](reference)


@pytest.mark.parametrize(
    ("exporter", "name", "shape", "expected"),
    [
        # A row of 69 bits takes three words; a scale a row; two numbers of the shape.
        ("compressed-tensors", "int3_channel_sym", (5, 23), 5 * 12 + 5 * 2 + 16),
        # 7 zero points of 4 bits down a column take one word.
        ("compressed-tensors", "int4_g32", (7, 64), 7 * 32 + 7 * 2 * 2 + 4 * 2 + 16),
        # Scale and bias of two bytes a group, whether there is a zero point or not.
        ("mlx-lm", "int4_g64_sym", (3, 128), 3 * 64 + 3 * 2 * 4),
        ("mlx-lm", "int4_g64", (3, 128), 3 * 64 + 3 * 2 * 4),
        # What the engine cannot hold is priced as the format itself, for the optimum without its rules.
        ("mlx-lm", "q4_0", (3, 128), 3 * 4 * 18),
        ("compressed-tensors", "nvfp4", (3, 128), find_format("nvfp4").storage_bytes((3, 128))),
        ("compressed-tensors", "bf16", (3, 128), 3 * 128 * 2),
        ("llama.cpp", "int4_g32_sym", (3, 128), 3 * 4 * 18),
    ],
)
def test_bytes_of_one_weight(exporter: str, name: str, shape: tuple[int, int], expected: int) -> None:
    weight = Weight(parameter="a.weight", expert_index=None, shape=shape, kind="linear")
    assert weight_bytes(weight, find_format(name), exporter) == expected
