"""Automatic choice: the least output error of those tried, with its name."""

import pytest
import torch

from runtime.formats import FORMATS
from runtime.quantization import dequantize
from runtime.quantizers import QUANTIZERS, TEXTLESS, InputStatistics, quantize
from runtime.quantizers.automatic import AUTOMATIC, SINGLE_QUANTIZERS, quantize_automatic
from tests.runtime.quantizers.cases import draw_statistics, draw_weight


@pytest.mark.parametrize("kind", ["correlated", "isotropic"])
@pytest.mark.parametrize("name", ["int2_g32", "int4_channel_sym"])
def test_the_least_output_error_is_kept(name: str, kind: str) -> None:
    weight = draw_weight(8, 96)
    statistics = draw_statistics(96) if kind == "correlated" else InputStatistics.isotropic(96)
    found = quantize(weight, FORMATS[name], "auto", statistics=statistics)
    results = {q: SINGLE_QUANTIZERS[q](weight, FORMATS[name], statistics) for q in AUTOMATIC}
    errors = {q: statistics.output_error(dequantize(r) - weight) for q, r in results.items()}
    assert found.quantizer == min(errors, key=errors.__getitem__)
    assert torch.equal(dequantize(found), dequantize(results[found.quantizer]))


def test_the_first_of_equals_is_kept() -> None:
    weight = dequantize(quantize(draw_weight(3, 64), FORMATS["int4_g64"]))
    assert quantize(weight, FORMATS["int4_g64"], "auto", statistics=draw_statistics(64)).quantizer == "rtn"


def test_those_named_are_tried() -> None:
    weight, statistics = draw_weight(3, 64), draw_statistics(64)
    found = quantize_automatic(weight, FORMATS["int2_g64"], statistics, quantizers=["rtn", "learned_rounding"])
    assert found.quantizer == "learned_rounding"


def test_every_result_names_its_quantizer() -> None:
    weight, statistics = draw_weight(3, 64), draw_statistics(64)
    for name in (*SINGLE_QUANTIZERS, *TEXTLESS):
        assert quantize(weight, FORMATS["int3_g64"], name, statistics=statistics).quantizer == name
    assert set(QUANTIZERS) == {*SINGLE_QUANTIZERS, *TEXTLESS, "auto"}


@pytest.mark.parametrize("names", [["rtn", "auto"], []], ids=str)
def test_unknown_names_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"quantizers must be among rtn, .*: got \["):
        quantize_automatic(draw_weight(1, 32), FORMATS["int2_g32"], draw_statistics(32), quantizers=names)
