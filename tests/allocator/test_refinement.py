"""Refinement: better on the text it measures on, within the limits, taken up from the store, honest about proof."""

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
from allocator.refinement import Refinement
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


def calibration_kl(profile: SensitivityProfile, model: Any, assignment: Assignment) -> float:
    return kl_on(profile.calibration_tokens, profile, model, assignment)


def kl_on(tokens: np.ndarray, profile: SensitivityProfile, model: Any, assignment: Assignment) -> float:
    named = {"a": assignment.formats_by_weight(profile.candidates)}
    return float(score_assignments(model, named, torch.from_numpy(tokens))["a"].kl.mean())


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
    assert calibration_kl(tiny_profile, model, refined) < calibration_kl(tiny_profile, model, start)
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


def test_of_plans_by_tilted_losses_the_best_measured_is_the_first_step(
    tiny_profile: SensitivityProfile, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    tables = build_cost_tables(tiny_profile)
    start = find_assignment(tiny_profile, BUDGET, tables, metric="fisher")
    model = Model(str(tiny_llama_dir)).reference.model
    refinement = make_refinement(tiny_profile, Store(tmp_path), lambda: model, rounds=1)
    starts = refinement._starts(start)
    narrow = min(f.bits for f in tiny_profile.candidates.formats)
    bits = np.array([f.bits for f in tiny_profile.candidates.formats])
    counts = [int(np.sum(bits[choice] == narrow)) for choice in starts]
    # A larger factor never makes a solver take the narrowest format for more weight.
    assert counts[-1] < counts[0]
    limit = tiny_profile.fixed_bytes + 3.6 * sum(u.weight_count for u in tiny_profile.candidates.units) / 8
    assert all(use_of(choice, tables)[MEMORY] <= limit for choice in starts)
    judged, _, _ = refinement._deal(0)
    losses = [kl_on(judged, tiny_profile, model, replace(start, choice=choice)) for choice in starts]
    np.testing.assert_array_equal(refinement._first_plan(start), starts[int(np.argmin(losses))])
    refined = refinement.run(start)
    best = min(calibration_kl(tiny_profile, model, replace(start, choice=choice)) for choice in starts)
    assert calibration_kl(tiny_profile, model, refined) <= best * (1 + 1e-6)


def test_text_is_dealt_anew_and_no_plan_is_measured_on_the_text_of_its_slope(
    tiny_profile: SensitivityProfile, tmp_path: Path
) -> None:
    refinement = make_refinement(tiny_profile, Store(tmp_path), refuse)
    dealt = [refinement._deal(r)[:2] for r in range(4)]
    known = {row.tobytes() for row in tiny_profile.calibration_tokens}
    for judged, own in dealt:
        rows = [{row.tobytes() for row in part} for part in (judged, own)]
        assert rows[0] and rows[1] and rows[0] | rows[1] <= known
        assert not rows[0] & rows[1]
    assert len({judged.tobytes() for judged, _ in dealt}) > 1
    for (judged, own), again in zip(dealt, (refinement._deal(r) for r in range(4)), strict=True):
        np.testing.assert_array_equal(judged, again[0])
        np.testing.assert_array_equal(own, again[1])
