"""Activation-aware scaling: never worse than no scaling, and the same outputs once inputs are divided."""

import pytest
import torch

from runtime.formats import FORMATS
from runtime.quantization import dequantize
from runtime.quantizers import find_activation_scale, scale_inputs
from runtime.quantizers.clipping import quantize_clipping
from runtime.quantizers.rtn import quantize_rtn
from tests.runtime.quantizers.cases import draw_statistics, draw_weight

FORMAT = FORMATS["int3_g32"]


@pytest.mark.parametrize("seed", range(5))
def test_scaling_is_never_worse_than_none(seed: int) -> None:
    weight, statistics = draw_weight(16, 96, seed), draw_statistics(96, seed=seed)
    found = find_activation_scale(weight, FORMAT, statistics)
    plain = statistics.output_error(dequantize(quantize_rtn(weight, FORMAT)) - weight)
    assert found.output_error <= plain
    assert found.output_error == statistics.output_error(found.rendered - weight)
    none = find_activation_scale(weight, FORMAT, statistics, exponents=[0.0])
    assert torch.equal(none.scale, torch.ones(96))
    assert none.output_error == plain


def test_a_large_channel_is_scaled_up() -> None:
    weight, statistics = draw_weight(64, 64), draw_statistics(64, dead=(5,))
    found = find_activation_scale(weight, FORMATS["int3_g64"], statistics)
    magnitude = statistics.root_mean_square()
    assert found.exponent > 0
    assert int(found.scale.argmax()) == int(magnitude.argmax())
    assert float(found.scale.max() * found.scale.min()) == pytest.approx(1.0, rel=1e-5)
    # A dead channel is scaled as the least of the others.
    alive = magnitude[magnitude > 0]
    assert torch.equal(found.scale[5], found.scale[magnitude == alive.min()][0])


def test_inputs_never_seen_are_not_scaled() -> None:
    statistics = draw_statistics(32, dead=tuple(range(32)))
    assert torch.equal(find_activation_scale(draw_weight(2, 32), FORMAT, statistics).scale, torch.ones(32))


def test_the_scaled_weight_reads_divided_inputs() -> None:
    weight, statistics, x = draw_weight(8, 64), draw_statistics(64), draw_weight(20, 64, seed=9)
    found = find_activation_scale(weight, FORMAT, statistics, quantizer=quantize_clipping)
    scaled, divided = scale_inputs(weight, statistics, found.scale)
    stored = dequantize(quantize_clipping(scaled, FORMAT))
    torch.testing.assert_close((x / found.scale) @ stored.T, x @ found.rendered.T, rtol=1e-5, atol=1e-4)
    assert divided.output_error(stored - scaled) == pytest.approx(found.output_error, rel=1e-3)


def test_no_exponents_and_other_inputs_are_refused() -> None:
    weight, statistics = draw_weight(2, 32), draw_statistics(32)
    with pytest.raises(ValueError, match="exponents must name at least one"):
        find_activation_scale(weight, FORMAT, statistics, exponents=[])
    with pytest.raises(ValueError, match="statistics must be of the weight's inputs"):
        find_activation_scale(weight, FORMAT, draw_statistics(64))
