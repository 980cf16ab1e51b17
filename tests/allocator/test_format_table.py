"""The table of formats, with and without a model, and as the command prints it."""

import json
from pathlib import Path

import pytest

import allocator
from allocator.cli import run
from runtime.formats import FORMATS


def test_all_formats_without_a_model() -> None:
    rows = allocator.list_formats()
    assert [row["format"] for row in rows] == list(FORMATS)
    assert all(row["refusal"] is None and row["stored_bits"] >= row["packed_bits"] for row in rows)
    by_name = {row["format"]: row for row in rows}
    # 32-bit scales of a whole weight of 4096 x 4096 hardly count.
    assert by_name["nvfp4"]["stored_bits"] == pytest.approx(4.5, abs=1e-5)
    assert by_name["q3_k"]["stored_bits"] == 3.4375
    assert by_name["q3_k"]["relative_error"] is None


def test_formats_on_a_weight(tiny_llama_dir: Path) -> None:
    calls = []
    names = ("int4_g64", "q4_k", "bf16", "mxfp4")
    rows = allocator.list_formats(str(tiny_llama_dir), formats=names, progress=lambda *args: calls.append(args))
    integer, refused, exact, block = rows
    assert refused["refusal"] == "group_size=256 does not divide in_features=128"
    assert refused["stored_bits"] is None and refused["relative_error"] is None
    assert 0 <= exact["relative_error"] < integer["relative_error"] < block["relative_error"] < 1
    assert integer["entropy_bits"] < 4
    assert calls[-1] == ("formats", 4, 4)
    [other] = allocator.list_formats(str(tiny_llama_dir), formats=("q8_0",), weight="model.layers.0.mlp.up_proj.weight")
    assert other["relative_error"] < 0.01
    [clipped] = allocator.list_formats(str(tiny_llama_dir), formats=("int4_g64",), quantizer="clipping")
    assert clipped["relative_error"] < integer["relative_error"]


def test_unknown_names(tiny_llama_dir: Path) -> None:
    with pytest.raises(ValueError, match="weight must be one of the model's: got 'nothing', e.g. 'model.embed"):
        allocator.list_formats(str(tiny_llama_dir), weight="nothing")
    with pytest.raises(ValueError, match="known name: got 'int9'"):
        allocator.list_formats(formats=("int9",))


def test_command(tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["formats", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["formats"]) == len(FORMATS)
    assert run(["formats", str(tiny_llama_dir), "--formats", "q4_k,mxfp4"]) == 0
    header, refused, shown = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["format", "kind"] and "stored_bits" in header
    assert refused.endswith("group_size=256 does not divide in_features=128")
    assert shown.endswith("bitplan, llama.cpp")
