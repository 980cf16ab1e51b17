"""A rule renders what its quantizer gives for the statistics of the weight at hand, and says which it lacks."""

from dataclasses import replace

import pytest
import torch

from runtime.apply import apply_formats_, simulated_formats
from runtime.formats import FORMATS
from runtime.kernels.dispatch import kernel_path
from runtime.quantizers import STATISTICAL
from runtime.rendering import Rendering, quantizer_name, render, render_weight, statistics_of
from runtime.units import Weight, list_weights
from tests.runtime.quantizers.cases import draw_statistics, draw_weight
from tests.tiny_models import build_tiny_llama

WEIGHT = Weight(parameter="layer.weight", expert_index=None, shape=(8, 64), kind="linear")
FORMAT = FORMATS["int3_g64"]


@pytest.mark.parametrize("quantizer", sorted(STATISTICAL))
def test_statistics_of_the_weight_are_used(quantizer: str) -> None:
    values, known, other = draw_weight(8, 64), draw_statistics(64), draw_statistics(64, seed=7)
    rule = Rendering(quantizer=quantizer, statistics={"layer.weight": known, "other.weight": other})
    rendered = render_weight(WEIGHT, values, FORMAT, rule)
    assert torch.equal(rendered, render(values, FORMAT, quantizer, statistics=known))
    assert not torch.equal(rendered, render(values, FORMAT, quantizer, statistics=other))
    assert quantizer_name(rule) == quantizer


def test_rule_of_a_quantizer_that_reads_the_weight_alone_is_its_name() -> None:
    values = draw_weight(8, 64)
    for quantizer in ("rtn", "clipping", "hqq"):
        rule = Rendering(quantizer=quantizer, statistics={"layer.weight": draw_statistics(64)})
        expected = render(values, FORMAT, quantizer)
        assert torch.equal(render_weight(WEIGHT, values, FORMAT, rule), expected)
        assert torch.equal(render_weight(WEIGHT, values, FORMAT, quantizer), expected)


def test_unquantized_formats_need_no_statistics() -> None:
    values = draw_weight(8, 64)
    for rule in ("gptq", Rendering(quantizer="gptq", statistics={})):
        assert statistics_of(WEIGHT, FORMATS["bf16"], rule) is None
        assert torch.equal(render_weight(WEIGHT, values, FORMATS["bf16"], rule), values.to(torch.bfloat16).float())


def test_missing_statistics_are_named() -> None:
    known = {"layer.weight": draw_statistics(64)}
    missing = replace(WEIGHT, parameter="new.weight")
    with pytest.raises(ValueError, match=r"'gptq' needs input statistics of every weight: got none for 'new\.weight'"):
        render_weight(missing, draw_weight(8, 64), FORMAT, Rendering(quantizer="gptq", statistics=known))
    with pytest.raises(ValueError, match=r"needs input statistics of every weight: got none for 'layer\.weight'"):
        render_weight(WEIGHT, draw_weight(8, 64), FORMAT, "gptq")
    with pytest.raises(ValueError, match="quantizer must be among rtn.*: got 'magic'"):
        Rendering(quantizer="magic", statistics={})


def test_packed_weights_are_the_simulated_ones() -> None:
    model = build_tiny_llama()
    weights = list_weights(model)
    statistics = {name: draw_statistics(weight.shape[1], seed=i) for i, (name, weight) in enumerate(weights.items())}
    rule = Rendering(quantizer="gptq", statistics=statistics)
    formats = dict.fromkeys(weights, "int3_g64")
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad(), kernel_path("reference"):
        with simulated_formats(model, formats, quantizer=rule):
            expected = model(tokens).logits
        with simulated_formats(model, formats):
            assert not torch.equal(model(tokens).logits, expected)
        apply_formats_(model, formats, quantizer=rule)
        assert torch.equal(model(tokens).logits, expected)
