"""Which engines hold which formats: the families that only one knows, and the ones that all know."""

import pytest

from runtime.format_engines import ENGINES, engines_of
from runtime.formats import FORMATS


@pytest.mark.parametrize(
    ("name", "engines"),
    [
        ("bf16", set(ENGINES)),
        ("q4_k", {"bitplan", "llama.cpp"}),
        ("mxfp4", set(ENGINES) - {"ONNX Runtime"}),
        ("int4_g64", set(ENGINES) - {"llama.cpp"}),
        ("int3_g64", {"bitplan", "compressed-tensors", "MLX"}),
        ("int8_g32", {"bitplan", "compressed-tensors", "MLX", "ONNX Runtime"}),
        ("int8_channel_sym", {"bitplan", "compressed-tensors", "vLLM"}),
        ("int1_g64_sym", {"bitplan"}),
        ("fp5_g64", {"bitplan"}),
    ],
)
def test_engines(name: str, engines: set[str]) -> None:
    assert set(engines_of(FORMATS[name])) == engines
