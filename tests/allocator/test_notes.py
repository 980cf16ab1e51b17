"""The notes of a report: each number recomputed, each sentence only where it is true."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

import allocator
from allocator.budget import Budget
from allocator.notes import list_notes
from allocator.plans import Evaluation, Plan
from allocator.store import Store
from sensitivity.profile import SensitivityProfile
from sensitivity.sketches.fisher_sketch import fisher_loss
from tests.tiny_measurements import make_request

BUDGET = Budget(bits_per_weight=5)


@pytest.fixture(scope="module")
def mixture(
    tiny_mixtral_dir: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SensitivityProfile]:
    store = Store(tmp_path_factory.mktemp("store"))
    request = make_request(tiny_text)
    yield allocator.measure(
        str(tiny_mixtral_dir),
        request=replace(request, config=replace(request.config, metrics=("fisher",))),
        store=store,
    )


def evaluation_of(plan: Plan, kl: float) -> Evaluation:
    return Evaluation(
        name=plan.name,
        kind="plan",
        memory_bytes=plan.memory_bytes,
        bits_per_weight=plan.bits_per_weight,
        predicted_kl=plan.predicted_kl,
        kl=kl,
        kl_low=kl,
        kl_high=kl,
        perplexity=2.0,
        perplexity_low=2.0,
        perplexity_high=2.0,
        tokens=100,
        shipped=True,
    )


def find(notes: tuple[str, ...], start: str) -> str:
    [note] = [note for note in notes if note.startswith(start)]
    return note


def test_a_dense_model_is_told_its_calibration_and_stability(tiny_profile: SensitivityProfile) -> None:
    plan = allocator.plan(tiny_profile, BUDGET, verify=False)
    notes = list_notes(tiny_profile, plan, [evaluation_of(plan, 0.5)])
    fit = tiny_profile.prediction_fits[plan.metric]
    assert plan.corrected_kl == pytest.approx(fit.correct(plan.predicted_kl))
    calibration = find(notes, "Calibration of the prediction")
    assert f"it is {fit.correct(plan.predicted_kl):.4g};" in calibration
    assert f"within a factor of {fit.error_factor:.3g} " in calibration
    assert f"measured over corrected is {0.5 / plan.corrected_kl:.3g}." in calibration
    assert tiny_profile.fisher_sketch is not None
    halves = [fisher_loss(tiny_profile.fisher_sketch[part::2])[0] for part in (0, 1)]
    lossy = [f for f in range(halves[0].shape[1]) if (halves[0][:, f] > 0).sum() >= 3]
    expected = []
    for f in lossy:
        kept = tiny_profile.candidates.allowed[:, f] & (halves[0][:, f] > 0) & (halves[1][:, f] > 0)
        expected.append(spearmanr(halves[0][kept, f], halves[1][kept, f]).statistic)
    assert f"correlation of {np.mean(expected):.3f} on average, {min(expected):.3f} at least" in find(
        notes, "Stability"
    )
    assert not any(note.startswith(("Experts", "Coverage")) for note in notes)


def test_a_latency_is_told_with_where_it_is_from(tiny_profile: SensitivityProfile) -> None:
    budget = Budget(bits_per_weight=5, limits={"latency_us": 100})
    plan = allocator.plan(tiny_profile, budget, verify=False, device="bitmod")
    (note,) = [n for n in list_notes(tiny_profile, plan, (evaluation_of(plan, 0.1),)) if n.startswith("Latency: ")]
    assert f"takes {plan.use['latency_us']:.4g} us of 100 us allowed, modelled for BitMoD" in note


def test_without_fitted_plans_the_report_says_so(tiny_profile: SensitivityProfile) -> None:
    bare = replace(tiny_profile, prediction_fits={}, fisher_sketch=None)
    plan = allocator.plan(bare, BUDGET, verify=False)
    assert plan.corrected_kl is None and plan.correction_error is None
    notes = list_notes(bare, plan, [evaluation_of(plan, 0.5)])
    assert find(notes, "Calibration of the prediction").endswith("no whole plans were measured to correct it by.")
    assert not any(note.startswith("Stability") for note in notes)


def test_a_mixture_is_told_its_experts(mixture: SensitivityProfile) -> None:
    plan = allocator.plan(mixture, BUDGET, verify=False)
    assert plan.metric == "fisher_shrunk"
    notes = list_notes(mixture, plan, [evaluation_of(plan, 0.5)])
    routing = mixture.routing
    assert routing is not None
    assert f"on {routing.tokens.sum()} calibration tokens {routing.usage_spread[0]:.3f}" in find(
        notes, "Experts: usage"
    )
    rare = routing.rare_experts(64)
    assert rare
    assert f"Coverage: {len(rare)} experts" in find(notes, "Coverage")
