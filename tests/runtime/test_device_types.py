"""The type is chosen by what the system says of the processor."""

from pathlib import Path

import pytest

from runtime.device_types import choose_dtype


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile\n", "bfloat16"),
        ("Features\t: fp asimd bf16 sve\n", "bfloat16"),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16_like\n", "float32"),
        ("", "float32"),
    ],
    ids=["x86", "arm", "without", "empty"],
)
def test_flags(text: str, dtype: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert choose_dtype(tmp_path / "cpuinfo") == dtype


def test_nothing_to_read(tmp_path: Path) -> None:
    assert choose_dtype(tmp_path / "absent") == "float32"
