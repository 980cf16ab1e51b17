"""Files of rendered weights: what is read is what was made, nothing else is ever read, and the bound is kept."""

from pathlib import Path

import pytest
import torch

from runtime.formats import FORMATS, Format
from runtime.quantization import QuantizedWeight
from runtime.quantizers import quantize
from runtime.rendered_files import RenderedFiles
from runtime.rendering import Rendering, encode_weight, render_weight
from runtime.units import Weight
from tests.runtime.quantizers.cases import draw_statistics, draw_weight

VALUES = draw_weight(5, 192)


class Maker:
    """Quantizes to nearest, and counts."""

    def __init__(self, format_: Format, values: torch.Tensor = VALUES) -> None:
        self.made = 0
        self._format = format_
        self._values = values

    def __call__(self) -> QuantizedWeight:
        self.made += 1
        return quantize(self._values, self._format, "rtn")


def assert_same(first: QuantizedWeight, second: QuantizedWeight) -> None:
    assert (first.format, first.quantizer) == (second.format, second.quantizer)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale, second.scale)
    assert (first.zero_point is None) == (second.zero_point is None)
    assert first.zero_point is None or second.zero_point is None or torch.equal(first.zero_point, second.zero_point)


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.kind == "int" and f.fits(192)])
def test_what_is_read_is_what_was_made(name: str, tmp_path: Path) -> None:
    format_ = FORMATS[name]
    make = Maker(format_)
    first = RenderedFiles(tmp_path / "files").read_or_make("w[3]", VALUES, format_, make)
    again = RenderedFiles(tmp_path / "files").read_or_make("w[3]", VALUES, format_, make)
    assert make.made == 1
    assert_same(first, quantize(VALUES, format_, "rtn"))
    assert_same(again, first)


def test_file_of_other_values_weight_or_format_is_not_read(tmp_path: Path) -> None:
    files, format_ = RenderedFiles(tmp_path), FORMATS["int3_g64"]
    changed = VALUES.clone()
    changed[4, 191] += 1e-3
    others = [("w", VALUES, "int3_g64"), ("v", VALUES, "int3_g64"), ("w", changed, "int3_g64")]
    for name, values, format_name in [*others, ("w", VALUES, "int4_g64")]:
        make = Maker(FORMATS[format_name], values)
        assert_same(files.read_or_make(name, values, FORMATS[format_name], make), make())
        assert make.made == 2
    assert len(list(tmp_path.iterdir())) == 4
    transposed = VALUES.T.contiguous().T
    assert_same(files.read_or_make("w", transposed, format_, make := Maker(format_)), quantize(VALUES, format_, "rtn"))
    assert make.made == 0


def test_damaged_file_is_made_again(tmp_path: Path) -> None:
    files, make = RenderedFiles(tmp_path), Maker(FORMATS["int4_g64"])
    first = files.read_or_make("w", VALUES, FORMATS["int4_g64"], make)
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    assert_same(files.read_or_make("w", VALUES, FORMATS["int4_g64"], make), first)
    assert_same(files.read_or_make("w", VALUES, FORMATS["int4_g64"], make), first)
    assert make.made == 2


def test_bound_on_bytes(tmp_path: Path) -> None:
    format_ = FORMATS["int8_g64"]
    # 5 x 192 codes, and for each of 5 x 3 groups a scale of two bytes and a zero point of one.
    one = 5 * 192 + 15 * 3
    for _ in range(2):
        files = RenderedFiles(tmp_path, most_bytes=2 * one + 1000)
        for name in ("a", "b", "c"):
            assert_same(files.read_or_make(name, VALUES, format_, Maker(format_)), quantize(VALUES, format_, "rtn"))
        assert len(list(tmp_path.iterdir())) == 2


def test_rule_reads_its_files(tmp_path: Path) -> None:
    weight = Weight(parameter="w", expert_index=None, shape=(5, 192), kind="linear")
    format_, statistics = FORMATS["int3_g64"], {"w": draw_statistics(192)}
    fresh = render_weight(weight, VALUES, format_, Rendering(quantizer="gptq", statistics=statistics))
    for _ in range(2):
        rule = Rendering(quantizer="gptq", statistics=statistics, files=RenderedFiles(tmp_path))
        assert torch.equal(render_weight(weight, VALUES, format_, rule), fresh)
    # Made of other statistics: what is in the files, which belong to those of before.
    other = Rendering(quantizer="gptq", statistics={"w": draw_statistics(192, seed=7)}, files=RenderedFiles(tmp_path))
    assert torch.equal(render_weight(weight, VALUES, format_, other), fresh)
    # Rounding to nearest is as fast as reading, and leaves no files.
    plain = Rendering(quantizer="rtn", statistics={}, files=RenderedFiles(tmp_path))
    render_weight(weight, VALUES, format_, plain)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_search_that_reads_the_weight_alone_is_kept_too(tmp_path: Path) -> None:
    weight = Weight(parameter="w", expert_index=None, shape=(5, 192), kind="linear")
    rule = Rendering(quantizer="clipping", statistics={}, files=RenderedFiles(tmp_path))
    fresh = render_weight(weight, VALUES, FORMATS["int3_g64"], "clipping")
    assert torch.equal(render_weight(weight, VALUES, FORMATS["int3_g64"], rule), fresh)
    [path] = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    assert torch.equal(render_weight(weight, VALUES, FORMATS["int3_g64"], rule), fresh)
    assert path.stat().st_mtime_ns == written


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_what_a_format_s_own_encoder_made_is_read(quantizer: str, tmp_path: Path) -> None:
    weight = Weight(parameter="w", expert_index=None, shape=(5, 192), kind="linear")
    statistics = {"w": draw_statistics(192)} if quantizer == "gptq" else {}
    for name in ("mxfp4", "q4_1", "fp4_g64", "nvint4"):
        format_ = FORMATS[name]
        fresh = render_weight(weight, VALUES, format_, Rendering(quantizer=quantizer, statistics=statistics))
        rule = Rendering(quantizer=quantizer, statistics=statistics, files=RenderedFiles(tmp_path))
        kept = encode_weight(weight, VALUES, format_, rule)
        [path] = tmp_path.glob(f"w-{name}-*.safetensors")
        written = path.stat().st_mtime_ns
        again = encode_weight(weight, VALUES, format_, rule)
        assert path.stat().st_mtime_ns == written
        assert {n: t.dtype for n, t in again.items()} == {n: t.dtype for n, t in kept.items()}
        assert all(torch.equal(again[n], tensor) for n, tensor in kept.items())
        assert torch.equal(render_weight(weight, VALUES, format_, rule), fresh)
    render_weight(weight, VALUES, FORMATS["bf16"], rule)
    assert len(list(tmp_path.iterdir())) == 4
