"""MC-MoE's integer program against enumeration, layer by layer."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import allocator
from allocator.assignments import pick, use_of
from allocator.budget import MEMORY, Budget
from allocator.expert_blocks import CODE_BITS, find_block_assignment, solve_expert_blocks
from allocator.planning import find_assignment
from allocator.problems import build_cost_tables, resolve_limits
from allocator.store import Store
from runtime.candidates import Candidates, list_candidates
from runtime.units import find_units
from sensitivity.profile import SensitivityProfile
from solvers import Termination
from tests.tiny_measurements import CONFIG, make_request
from tests.tiny_models import build_tiny_llama, build_tiny_mixtral

FORMATS = ("int2_g32", "int3_g32", "int4_g32", "int8_g32")


def make_candidates() -> Candidates:
    return list_candidates(find_units(build_tiny_mixtral(), experts="expert"), FORMATS)


def draw_loss(candidates: Candidates, seed: int) -> np.ndarray:
    loss = np.random.default_rng(seed).exponential(size=candidates.allowed.shape)
    return np.sort(loss, axis=1)[:, ::-1].copy()


@pytest.mark.parametrize("used", [(), ("int3_g32",), ("int2_g32", "int4_g32")], ids="+".join)
@pytest.mark.parametrize("mean_bits", [2.5, 3.0, 3.25])
def test_every_layer_has_its_best_plan(mean_bits: float, used: tuple[str, ...]) -> None:
    candidates = make_candidates()
    loss = draw_loss(candidates, 3)
    blocks = solve_expert_blocks(
        candidates, loss, mean_bits=mean_bits, other_format="int8_g32", used_formats=used, params=None
    )
    assert blocks.choice is not None
    assert [candidates.units[u].kind for u in blocks.units] == ["expert"] * 8
    bits = np.array([f.bits for f in candidates.formats])
    needed = [candidates.format_index(name) for name in used]
    for layer in (0, 1):
        units = [u for u in blocks.units if candidates.units[u].layer_index == layer]
        best = min(
            (sum(loss[u, f] for u, f in zip(units, choice, strict=True)), choice)
            for choice in itertools.product(range(4), repeat=4)
            if bits[list(choice)].mean() <= mean_bits and set(needed) <= set(choice)
        )
        assert blocks.choice[units].tolist() == list(best[1])
    others = np.setdiff1d(np.arange(len(candidates.units)), blocks.units)
    assert (blocks.choice[others] == candidates.format_index("int8_g32")).all()
    assert blocks.result.resources == (CODE_BITS,)
    assert blocks.result.use[0] == pytest.approx(
        sum(bits[blocks.choice[u]] * candidates.units[u].weight_count for u in blocks.units)
    )


def test_units_that_may_not_take_the_other_format_take_what_they_may() -> None:
    candidates = make_candidates()
    blocks = solve_expert_blocks(candidates, draw_loss(candidates, 0), mean_bits=3.0, other_format="int2_g32")
    assert blocks.choice is not None
    assert [candidates.formats[blocks.choice[u]].name for u in (0, 1, -1)] == ["int4_g32", "int2_g32", "int4_g32"]


def test_no_plan_below_the_narrowest_width() -> None:
    candidates = make_candidates()
    blocks = solve_expert_blocks(candidates, draw_loss(candidates, 0), mean_bits=1.5, other_format="int4_g32")
    assert blocks.choice is None
    assert blocks.result.termination in (Termination.NO_SOLUTION_FOUND, Termination.INFEASIBLE)


def test_models_without_experts_and_unknown_formats_are_refused() -> None:
    dense = list_candidates(find_units(build_tiny_llama()), FORMATS)
    with pytest.raises(ValueError, match="candidates must hold experts: got none among 16 units"):
        solve_expert_blocks(dense, draw_loss(dense, 0), mean_bits=3.0, other_format="int4_g32")
    candidates = make_candidates()
    with pytest.raises(ValueError, match="format must be among the candidates: got 'bf16'"):
        solve_expert_blocks(candidates, draw_loss(candidates, 0), mean_bits=3.0, other_format="bf16")


@pytest.fixture(scope="module")
def mixture(tiny_mixtral_dir: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> SensitivityProfile:
    config = replace(CONFIG, metrics=("weight_error", "fisher"), fit_plans=None)
    request = make_request(tiny_text, config=config)
    return allocator.measure(str(tiny_mixtral_dir), request=request, store=Store(tmp_path_factory.mktemp("store")))


@pytest.mark.parametrize("bits", [3.7, 4.2, 5.0])
def test_the_largest_width_that_fits_a_budget_is_found(mixture: SensitivityProfile, bits: float) -> None:
    budget, tables = Budget(bits_per_weight=bits), build_cost_tables(mixture)
    limit = resolve_limits(mixture, budget)[MEMORY]
    best = find_assignment(mixture, budget, tables, metric="fisher")
    found = find_block_assignment(mixture, budget, tables, best)
    assert found is not None and found.result is not None and best.result is not None
    loss = mixture.table("fisher").loss
    fitting = {}
    for eighths in range(16, 129):
        blocks = solve_expert_blocks(mixture.candidates, loss, mean_bits=eighths / 8, other_format="int4_g64")
        if blocks.choice is not None and use_of(blocks.choice, tables)[MEMORY] <= limit:
            fitting[eighths] = blocks.choice
    assert found.name == f"experts layer by layer, {max(fitting) / 8:g} bits"
    np.testing.assert_array_equal(found.choice, fitting[max(fitting)])
    # The proof is that of the budget's own optimum.
    assert found.result.objective == pytest.approx(pick(loss, found.choice).sum())
    assert found.result.lower_bound == best.result.lower_bound <= best.result.objective <= found.result.objective
    assert found.result.use[0] + tables[MEMORY].fixed == use_of(found.choice, tables)[MEMORY]


def test_it_competes_with_the_other_plans_of_a_mixture(
    mixture: SensitivityProfile, tiny_mixtral_dir: Path, tmp_path: Path
) -> None:
    made = allocator.plan(str(tiny_mixtral_dir), Budget(bits_per_weight=4.2), profile=mixture, store=Store(tmp_path))
    assert any(e.name.startswith("experts layer by layer, ") for e in made.evaluations)


def test_there_is_none_without_experts_or_room(mixture: SensitivityProfile, tiny_profile: SensitivityProfile) -> None:
    for profile, budget in (
        (tiny_profile, Budget(bits_per_weight=4.2)),
        (mixture, Budget(max_kl=1.0)),
        (mixture, Budget(bits_per_weight=2.7)),
    ):
        tables = build_cost_tables(profile)
        best = find_assignment(profile, budget, tables, metric="fisher")
        assert find_block_assignment(profile, budget, tables, best) is None
