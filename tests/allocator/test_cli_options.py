"""Options of ``measure`` that change how much is measured, and in which type."""

import json
from pathlib import Path

import pytest

from allocator.cli import run
from runtime.device_types import choose_dtype
from tests.tiny_measurements import FLAGS

FEW = ("--metrics", "fisher", "--fit-plans", "none")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path))


def test_the_type_of_the_products(tiny_llama_dir: Path, tiny_text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for dtype in ("float32", "bfloat16", "auto"):
        arguments = ["measure", str(tiny_llama_dir), "--calibration", str(tiny_text), *FLAGS, *FEW, "--dtype", dtype]
        assert run([*arguments, "--json"]) == 0
        found[dtype] = json.loads(capsys.readouterr().out)["profile"]
    assert found["float32"] != found["bfloat16"]
    assert found["auto"] == found[choose_dtype()]


def test_sequences_until_plans_are_stable(
    tiny_llama_dir: Path, tiny_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["measure", str(tiny_llama_dir), "--calibration", str(tiny_text), *FLAGS, *FEW, "--until-stable"]
    assert run([*arguments, "--sequences", "90", "--sequence-tokens", "8", "--json"]) == 0
    provenance = json.loads(capsys.readouterr().out)["provenance"]
    assert int(provenance["fisher_sequences"]) in (32, 64, 90)
