"""GPTQ's codes on the grids of other families: the same scales, and less output error."""

import pytest
import torch

from runtime.codecs import CODECS
from runtime.formats import FORMATS
from runtime.quantizers import InputStatistics
from runtime.rendering import encode, render
from tests.runtime.quantizers.cases import draw_statistics, draw_weight

NAMES = (
    *("int1_g64", "int1_channel_sym", "int1_g32_sym_pow2", "mxfp4", "mxint8", "nvfp4", "nvint4", "fp6_e3m2_g64"),
    *("ternary_g64", "ternary_channel_median", "bitmod3_g64", "bitmod4_g32", "intfp4_g32", "intfp8_g16"),
    *("int1_top20int4_channel", "int4_top12int8_g64", "int2_mix25int4_g32", "int2_mix25int4_g64_outliers"),
    *("bcq2_g64", "bcq3_channel", "bcq4_g64_pow2", "dual_binary_g64"),
    *(
        "fp3_channel",
        "fp4_g64",
        "q4_0",
        "q4_1",
        "q5_1",
        "q8_0",
        "q2_k",
        "q3_k",
        "q4_k",
        "q5_k",
        "q6_k",
        "iq4_nl",
        "iq4_xs",
    ),
)
SHAPE = (12, 256)


@pytest.mark.parametrize("name", NAMES)
def test_output_error_falls_and_scales_stay(name: str) -> None:
    weight, statistics, format_ = draw_weight(*SHAPE), draw_statistics(256), FORMATS[name]
    kept = encode(weight, format_, "learned_rounding", statistics=statistics)  # its own encoder, with the importance
    moved = encode(weight, format_, "gptq", statistics=statistics)
    codec = CODECS[format_.kind]
    errors = [statistics.output_error(codec.decode(t, format_, SHAPE, None) - weight) for t in (kept, moved)]
    assert errors[1] < 0.7 * errors[0]
    if "blocks" not in moved:
        assert all(torch.equal(moved[n], kept[n]) for n in moved if not n.startswith("codes"))
    assert torch.equal(
        render(weight, format_, "auto", statistics=statistics), codec.decode(moved, format_, SHAPE, None)
    )


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_say_nothing_leave_the_nearest_codes(name: str) -> None:
    weight, isotropic, format_ = draw_weight(*SHAPE), InputStatistics.isotropic(256), FORMATS[name]
    moved, nearest = (render(weight, format_, q, statistics=isotropic) for q in ("gptq", "learned_rounding"))
    assert torch.equal(moved, nearest)


def test_statistics_of_another_input_are_refused() -> None:
    with pytest.raises(ValueError, match="statistics must be of the weight's inputs: got in_features=64"):
        encode(draw_weight(*SHAPE), FORMATS["mxfp4"], "gptq", statistics=draw_statistics(64))
