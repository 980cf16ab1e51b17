"""Sums over members: equal totals, exact for what is additive, and legality that all members share."""

import numpy as np
import pytest
import torch

from runtime.candidates import list_candidates
from runtime.engine_rules import GATE_UP, QKV, Engine, FormatRule
from runtime.units import EXPERT_GRANULARITIES, find_units
from sensitivity.criteria.output_error import measure_output_error
from sensitivity.experts.granularity import list_granularities, merge_candidates
from sensitivity.sketches.fisher_sketch import fisher_loss, measure_fisher_sketch
from tests.tiny_models import VOCABULARY_SIZE, build_tiny_llama, build_tiny_mixtral, build_tiny_qwen_moe

FORMATS = ("int2_g64", "int4_g32", "bf16")
TOKENS = torch.randint(2, VOCABULARY_SIZE, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("experts", EXPERT_GRANULARITIES)
def test_merged_tables_are_those_measured_at_that_granularity(experts: str) -> None:
    model = build_tiny_qwen_moe().requires_grad_(False)
    fine = list_candidates(find_units(model), FORMATS)
    coarse = list_candidates(find_units(model, experts=experts), FORMATS)
    merged = merge_candidates(fine, experts)
    assert merged.candidates.units == coarse.units
    np.testing.assert_array_equal(merged.candidates.allowed, coarse.allowed)
    error = merged.sum_table(measure_output_error(model, fine, TOKENS))
    # The same float32 numbers, added in another order in float64.
    np.testing.assert_allclose(error, measure_output_error(model, coarse, TOKENS), rtol=1e-12)
    fine_sketch = np.stack(list(measure_fisher_sketch(model, fine, TOKENS, seed=0)))
    sketch = merged.sum_table(fine_sketch)
    expected = np.stack(list(measure_fisher_sketch(model, coarse, TOKENS, seed=0)))
    np.testing.assert_allclose(sketch, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    loss, std_error = fisher_loss(fine_sketch)
    sums, errors = merged.sum_losses(loss, std_error)
    allowed = fine.allowed.all(axis=0)
    np.testing.assert_allclose(sums[:, allowed].sum(axis=0), loss[:, allowed].sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(
        np.square(errors)[:, allowed].sum(axis=0), np.square(std_error)[:, allowed].sum(axis=0), rtol=1e-12
    )
    for m, unit in enumerate(coarse.units):
        members = [u for u, part in enumerate(fine.units) if set(part.weights) <= set(unit.weights)]
        assert merged.member_of[members].tolist() == [m] * len(members)


def test_fused_tables_are_those_measured_on_fused_units() -> None:
    model = build_tiny_qwen_moe().requires_grad_(False)
    engine = Engine(
        name="e",
        reads="",
        rules=(FormatRule(formats="int.*", kinds=("linear", "head", "embedding", "expert")),),
        fuse=(QKV, GATE_UP, r"nothing_of_that_name"),
        experts="stack",
        menu=(),
        exporter="",
        command="",
        checked="",
    )
    fine = list_candidates(find_units(model), FORMATS)
    merged = merge_candidates(fine, engine=engine)
    coarse = list_candidates(find_units(model, fuse=[QKV, GATE_UP], experts="stack"), FORMATS)
    assert merged.candidates.units == coarse.units
    assert {"q_proj+k_proj+v_proj", "gate_proj+up_proj"} <= {unit.role for unit in coarse.units}
    sketch = merged.sum_table(np.stack(list(measure_fisher_sketch(model, fine, TOKENS, seed=0))))
    expected = np.stack(list(measure_fisher_sketch(model, coarse, TOKENS, seed=0)))
    np.testing.assert_allclose(sketch, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_a_format_is_allowed_where_all_members_allow_it() -> None:
    pins = {r"experts\.down_proj\[1\]": "int4_g32"}
    fine = list_candidates(find_units(build_tiny_mixtral()), FORMATS, pins=pins)
    merged = merge_candidates(fine, "stack_projection").candidates
    down = [u for u, unit in enumerate(merged.units) if unit.role == "down_proj"]
    assert merged.allowed[down].tolist() == [[False, True, False]] * 2
    assert {merged.reasons[u, 0] for u in down} == {"pinned to int4_g32"}
    assert not merge_candidates(fine, "stack_projection").sum_table(np.ones(fine.allowed.shape))[down, 0].any()
    pins[r"experts\.down_proj\[2\]"] = "bf16"
    with pytest.raises(ValueError, match=r"got none for '.*down_proj\[0-3\]' at granularity 'stack_projection'"):
        merge_candidates(list_candidates(find_units(build_tiny_mixtral()), FORMATS, pins=pins), "stack_projection")


def test_granularities_that_differ() -> None:
    assert list_granularities(find_units(build_tiny_mixtral())) == tuple(EXPERT_GRANULARITIES)
    assert list_granularities(find_units(build_tiny_mixtral(), experts="expert")) == ("projection", "stack_projection")
    assert list_granularities(find_units(build_tiny_llama())) == ("projection",)
