"""Options of ``measure`` that change how much is measured and in which type, and the store that keeps it."""

import json
import shutil
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


def test_the_store_says_what_it_keeps(
    tiny_llama_dir: Path, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["measure", str(tiny_llama_dir), "--calibration", str(tiny_text), *FLAGS, *FEW]
    assert run([*arguments, "--quantizer", "gptq", "--json"]) == 0
    profile = tmp_path / "profiles" / json.loads(capsys.readouterr().out)["profile"]
    assert run(["store", "--prune", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["freed_bytes"] == 0
    sizes = {row["kind"]: (row["entries"], row["bytes"]) for row in document["kinds"]}
    assert sizes["profiles"][0] == sizes["renderings"][0] == 1
    shutil.rmtree(profile)
    assert run(["store", "--prune", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed_bytes"] == sizes["renderings"][1] > 0
    assert run(["store"]) == 0
    assert f"{tmp_path}, freed 0 bytes" in capsys.readouterr().out
