"""What rules cost: the optimum under each recomputed by exhaustive search or from the plan, never less than without."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import allocator
from allocator.budget import MEMORY, Budget
from allocator.engine_rules import restrict_profile
from allocator.plans import Plan
from allocator.problems import build_cost_tables
from allocator.rule_prices import FREE, RulePrice, price_rules_of
from allocator.store import Store
from runtime.engines import find_engine
from runtime.formats import find_formats
from sensitivity.experts.granularity import merge_candidates
from sensitivity.profile import SensitivityProfile
from tests.tiny_measurements import make_request

BUDGET = Budget(bits_per_weight=6.5)
FORMATS = ("int3_g64", "q4_0", "q8_0", "int4_g64", "int8_channel_sym", "bf16")


@pytest.fixture(scope="module")
def mixture(
    tiny_mixtral_dir: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SensitivityProfile]:
    store = Store(tmp_path_factory.mktemp("store"))
    request = make_request(tiny_text, formats=FORMATS, embedding_formats=FORMATS)
    config = replace(request.config, metrics=("fisher",))
    yield allocator.measure(str(tiny_mixtral_dir), request=replace(request, config=config), store=store)


def price(profile: SensitivityProfile, engine: str | None) -> tuple[Plan, list[RulePrice]]:
    plan = allocator.plan(profile, BUDGET, verify=False, engine=engine)
    return plan, price_rules_of(profile, plan)


def test_formats_of_the_fixture_are_those_it_names(mixture: SensitivityProfile) -> None:
    assert mixture.candidates.formats == find_formats(FORMATS)


def test_coarser_experts_lose_more(mixture: SensitivityProfile) -> None:
    plan, prices = price(mixture, None)
    assert [p.rule for p in prices] == [
        FREE,
        "One format for each expert",
        "One format for all experts of a projection",
        "One format for all experts of a layer",
    ]
    assert [p.against for p in prices] == [None, FREE, FREE, FREE]
    losses = [p.predicted_loss for p in prices]
    assert losses[0] == pytest.approx(plan.predicted_kl)
    # A stack is coarser than an expert, and than a projection of all; these two do not compare.
    assert losses[0] <= min(losses[1:3]) and max(losses[1:3]) <= losses[3]  # type: ignore[type-var,operator]
    for name, found in zip(("expert", "stack_projection", "stack"), prices[1:], strict=True):
        assert found.units == len(merge_candidates(mixture.candidates, name).candidates.units)


@pytest.mark.parametrize(
    ("engine", "shared"),
    [("llama.cpp", "one format for all experts of a projection"), ("vllm", "one format for all experts of a layer")],
)
def test_an_engines_block_rule_is_priced_against_free_experts(
    mixture: SensitivityProfile, engine: str, shared: str
) -> None:
    plan, prices = price(mixture, engine)
    free, bound = prices[-2:]
    assert bound.rule == f"All rules of {engine}: {shared}"
    assert bound.against == free.rule == f"Formats and fusions of {engine}, every expert free"
    assert bound.predicted_loss == pytest.approx(plan.predicted_kl)
    # Sums in another order differ by rounding where the rule costs nothing.
    losses = [p.predicted_loss * (1 + slack) for p, slack in ((prices[0], -1e-12), (free, 0), (bound, 1e-12))]  # type: ignore[operator]
    assert losses == sorted(losses)
    assert bound.units == len(plan.units) < free.units
    restricted = restrict_profile(mixture, replace(find_engine(engine), experts="projection"))
    assert free.units == len(restricted.candidates.units)
    assert all(p.memory_bytes is not None and p.memory_bytes <= plan.memory_bytes for p in prices)


def test_price_under_an_engine_is_that_of_every_choice_tried(mixture: SensitivityProfile) -> None:
    """Only the experts of one projection stack are left to choose, so that all choices can be counted out."""
    plan, prices = price(mixture, "vllm")
    of = restrict_profile(mixture, find_engine("vllm"))
    loss, table = of.table("fisher_shrunk").loss, build_cost_tables(of)[MEMORY]
    allowed = [np.flatnonzero(row) for row in of.candidates.allowed]
    assert np.prod([len(row) for row in allowed]) < 1e6
    rows = np.arange(len(allowed))
    best = min(
        loss[rows, choice].sum()
        for choice in map(np.array, product(*allowed))
        if table.cost[rows, choice].sum() + table.fixed <= plan.memory_bytes
    )
    assert prices[-1].predicted_loss == pytest.approx(best)


def test_a_dense_model_has_no_rules_to_price(tiny_profile: SensitivityProfile) -> None:
    plan = allocator.plan(tiny_profile, Budget(bits_per_weight=5), verify=False)
    assert price_rules_of(tiny_profile, plan) == []


def test_losses_that_are_no_kl_have_no_price(mixture: SensitivityProfile) -> None:
    table = replace(mixture.table("fisher"), unit_of_measure="squared error")
    bare = replace(mixture, losses={"weight_error": table}, fisher_sketch=None)
    plan = allocator.plan(bare, BUDGET, verify=False)
    assert price_rules_of(bare, plan) == []


def test_a_budget_that_no_coarser_unit_keeps_says_so(mixture: SensitivityProfile) -> None:
    plan = allocator.plan(mixture, BUDGET, verify=False)
    tables = build_cost_tables(mixture)
    least = np.where(mixture.candidates.allowed, tables[MEMORY].cost, np.inf).min(axis=1).sum() + tables[MEMORY].fixed
    prices = price_rules_of(mixture, replace(plan, memory_bytes=int(least) - 1))
    assert [(p.predicted_loss, p.memory_bytes) for p in prices] == [(None, None)] * 4
