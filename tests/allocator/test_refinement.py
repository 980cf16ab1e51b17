"""Refinement: never worse on the text it accepts by, within the limits, taken up from the store, honest about proof."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import allocator
from allocator.artefacts import Model
from allocator.assignments import Assignment, list_uniform, use_of
from allocator.budget import MEMORY, Budget
from allocator.planning import find_assignment
from allocator.problems import build_cost_tables
from allocator.refinement import (
    ACCEPTANCE_SHARE,
    FORGETTING,
    LARGEST_NORM,
    Refinement,
    combine_slopes,
    limit_norms,
)
from allocator.store import Store
from sensitivity.evaluation import score_assignments
from sensitivity.profile import SensitivityProfile
from solvers import Termination

BUDGET = Budget(bits_per_weight=3.6)


def make_refinement(
    profile: SensitivityProfile, store: Store, load_model: Callable[[], Any], /, **changes: Any
) -> Refinement:
    settings = {
        "profile": profile,
        "budget": BUDGET,
        "tables": build_cost_tables(profile),
        "store": store,
        "progress": lambda *_: None,
        "load_model": load_model,
        "rounds": 3,
    }
    return Refinement(**{**settings, **changes})


def acceptance_kl(profile: SensitivityProfile, model: Any, assignment: Assignment) -> float:
    count = max(2, round(ACCEPTANCE_SHARE * len(profile.calibration_tokens)))
    tokens = torch.from_numpy(profile.calibration_tokens[:count])
    scores = score_assignments(model, {"a": assignment.formats_by_weight(profile.candidates)}, tokens)
    return float(scores["a"].kl.mean())


def refuse() -> Any:
    pytest.fail("the model was loaded though everything is in the store")


def test_a_poor_start_is_improved_within_the_budget_and_from_the_store_again(
    tiny_profile: SensitivityProfile, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    store, tables = Store(tmp_path), build_cost_tables(tiny_profile)
    model = Model(str(tiny_llama_dir)).reference.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    # The smallest uniform plan leaves most of the budget unused: there is something to find.
    start = min(list_uniform(tiny_profile.candidates, "combined"), key=lambda a: use_of(a.choice, tables)[MEMORY])
    refined = make_refinement(tiny_profile, store, lambda: model).run(start)
    assert refined.name == f"{start.name}, refined"
    assert refined.kind == "plan"
    assert acceptance_kl(tiny_profile, model, refined) < acceptance_kl(tiny_profile, model, start)
    limit = tiny_profile.fixed_bytes + 3.6 * sum(u.weight_count for u in tiny_profile.candidates.units) / 8
    assert use_of(refined.choice, tables)[MEMORY] <= limit
    assert tiny_profile.candidates.allowed[np.arange(len(refined.choice)), refined.choice].all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = make_refinement(tiny_profile, store, refuse).run(start)
    np.testing.assert_array_equal(again.choice, refined.choice)
    assert not any(store.pieces("x").parent.glob("*"))


def test_a_refined_plan_claims_no_more_than_the_additive_bound(
    tiny_profile: SensitivityProfile, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    tables = build_cost_tables(tiny_profile)
    start = find_assignment(tiny_profile, BUDGET, tables, metric="weight_error")
    model = Model(str(tiny_llama_dir)).reference.model
    refined = make_refinement(tiny_profile, Store(tmp_path), lambda: model).run(start)
    assert start.result is not None and refined.result is not None
    if refined is start:
        pytest.fail("the plan by weight error is far from the best: a round must find a better one")
    assert refined.result.termination is Termination.FEASIBLE
    assert refined.result.lower_bound == start.result.lower_bound
    table = tiny_profile.table("weight_error").loss
    assert refined.result.objective == pytest.approx(table[np.arange(len(refined.choice)), refined.choice].sum())
    assert refined.result.gap >= 0.0


def test_the_verb_measures_the_refined_plan_beside_its_rivals(
    tiny_profile: SensitivityProfile, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    made = allocator.plan(
        str(tiny_llama_dir), BUDGET, metric="weight_error", refine=2, profile=tiny_profile, store=Store(tmp_path)
    )
    kl = {e.name: e.kl for e in made.evaluations}
    assert any(name.endswith(", refined") for name in kl)
    assert kl[made.name] == min(kl.values())
    assert made.memory_bytes <= made.limits[MEMORY]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds of refinement must be at least 1: got 0"),
        ({"budget": Budget(max_kl=0.1)}, "refinement lowers the loss under limits: got"),
        ({"profile": None}, "refinement needs the Fisher sketch: the profile holds none"),
    ],
)
def test_what_cannot_be_refined_is_refused(
    changes: dict[str, Any], message: str, tiny_profile: SensitivityProfile, tmp_path: Path
) -> None:
    if "profile" in changes:
        changes = {"profile": replace(tiny_profile, fisher_sketch=None)}
    with pytest.raises(ValueError, match=message):
        make_refinement(tiny_profile, Store(tmp_path), refuse, **changes)


def test_refinement_without_verification_is_refused(tiny_profile: SensitivityProfile) -> None:
    with pytest.raises(
        ValueError, match="refinement and evolution measure: got refine=1, evolve=0 without verification"
    ):
        allocator.plan(tiny_profile, BUDGET, verify=False, refine=1)


def test_slopes_combine_as_a_weighted_sample() -> None:
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=(5, 3, 4)), rng.normal(size=(7, 3, 4))
    choice = np.array([1, 0, 3])
    mean, error = combine_slopes([old, new], choice)
    weights = np.concatenate([np.full(5, FORGETTING), np.ones(7)])
    relative = np.concatenate([old, new])
    relative = relative - np.take_along_axis(relative, choice[None, :, None].repeat(12, axis=0), axis=2)
    expected = (weights[:, None, None] * relative).sum(axis=0) / weights.sum()
    np.testing.assert_allclose(mean, expected, atol=1e-12)
    spread = (weights[:, None, None] * (relative - expected) ** 2).sum(axis=0) / weights.sum()
    effective = weights.sum() ** 2 / (weights**2).sum()
    np.testing.assert_allclose(error, np.sqrt(spread / effective), atol=1e-12)
    assert np.all(mean[np.arange(3), choice] == 0.0)
    one, one_error = combine_slopes([new], choice)
    np.testing.assert_allclose(one_error[0, 0], (new[:, 0, 0] - new[:, 0, 1]).std() / np.sqrt(7), atol=1e-12)
    np.testing.assert_allclose(one[0, 0], (new[:, 0, 0] - new[:, 0, 1]).mean(), atol=1e-12)


def test_one_sequence_does_not_outweigh_the_others() -> None:
    slope = np.ones((5, 2, 3))
    slope[2] *= 100.0
    limited = limit_norms(slope)
    np.testing.assert_array_equal(np.delete(limited, 2, axis=0), np.delete(slope, 2, axis=0))
    np.testing.assert_allclose(limited[2], LARGEST_NORM)
    np.testing.assert_array_equal(limit_norms(np.zeros((3, 2, 2))), np.zeros((3, 2, 2)))
