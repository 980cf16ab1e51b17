"""Verify plans by measurement: score assignments on text that neither the estimator nor the solver saw, ship the best.

Scores are kept in the store by content (profile, text, formats), so no assignment is measured twice.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from allocator.assignments import Assignment, bits_per_weight, cache_use, pick
from allocator.budget import Budget
from allocator.planning import predicted_kl
from allocator.plans import Evaluation
from allocator.renderings import needs_statistics, rendering_of
from allocator.store import Store
from allocator.transformed import TRANSFORMS_CONTENT, is_transformed
from runtime.activation_names import is_activation
from runtime.costs import CostTable
from runtime.units import count_weights
from sensitivity.cache_losses import reference_cache_bytes
from sensitivity.evaluation import SequenceScores, mean_interval, score_assignments
from sensitivity.profile import SensitivityProfile, fingerprint_of

Progress = Callable[[str, int, int], None]
REFERENCE = "reference"
EVALUATION_VERSION = 1


def score_cached(
    profile: SensitivityProfile,
    formats_by_name: Mapping[str, Mapping[str, str]],
    tokens: np.ndarray,
    *,
    load_model: Callable[[], Any],
    store: Store,
    progress: Progress,
) -> dict[str, SequenceScores]:
    """Returns the scores of assignments by name; only those not in the store are measured.

    Args:
        profile: The profile the assignments were made from.
        formats_by_name: Name -> name of a weight, a cache unit or an input -> format name; none for the
            reference.
        tokens: [S, T] int64 text.
        load_model: Gives the reference model; called only when something must be measured.
        store: Where scores are kept.
        progress: Called with (stage, done, total).
    """
    keys = {
        name: fingerprint_of(
            {
                "version": EVALUATION_VERSION,
                "model": profile.provenance["model_fingerprint"],
                "quantizer": profile.provenance["quantizer"],
                **({"transforms": profile.provenance[TRANSFORMS_CONTENT]} if is_transformed(profile) else {}),
                # What a quantizer renders from weights alone is the same for every profile.
                **({"statistics": profile.fingerprint} if needs_statistics(profile) else {}),
                # So are static scales of activations.
                **({"scales": profile.fingerprint} if any(map(is_activation, formats)) else {}),
                "tokens": fingerprint_of({"tokens": tokens.tolist()}),
                "formats": dict(formats),
            }
        )
        for name, formats in formats_by_name.items()
    }
    scores: dict[str, SequenceScores] = {}
    missing: dict[str, Mapping[str, str]] = {}
    for name, formats in formats_by_name.items():
        arrays = store.find_evaluation(keys[name])
        if arrays is None:
            missing[name] = formats
        else:
            scores[name] = SequenceScores(kl=arrays["kl"], nll=arrays["nll"])
    if missing:
        model = load_model()
        measured = score_assignments(
            model,
            missing,
            torch.from_numpy(tokens),
            quantizer=rendering_of(profile, model, store),
            activation_scales=None if profile.activations is None else profile.activations.scales,
            progress=lambda done, total: progress("verify", done, total),
        )
        for name, score in measured.items():
            store.save_evaluation(keys[name], {"kl": score.kl, "nll": score.nll})
            scores[name] = score
    return {name: scores[name] for name in formats_by_name}


def choose_best(
    assignments: Sequence[Assignment], scores: Mapping[str, SequenceScores], memory: CostTable, budget: Budget
) -> Assignment | None:
    """Returns the assignment to ship: the least measured KL, or the smallest that keeps a ceiling on KL.

    Returns None when a ceiling is asked for and none keeps it.
    """
    if budget.max_kl is None:
        return min(assignments, key=lambda a: float(scores[a.name].kl.mean()))
    kept = [a for a in assignments if float(scores[a.name].kl.mean()) <= budget.max_kl]
    return min(kept, key=lambda a: float(pick(memory.cost, a.choice).sum())) if kept else None


def describe_choice(best: Assignment, assignments: Sequence[Assignment], scores: Mapping[str, SequenceScores]) -> str:
    """Returns the verdict: the shipped assignment against the best uniform one, with a paired interval."""
    kl = float(scores[best.name].kl.mean())
    rivals = [a for a in assignments if a.kind == "uniform" and a.name != best.name]
    if best.kind == "uniform":
        return (
            f"No plan measured better than '{best.name}' (KL {kl:.4g} nats per token), which ships: "
            "no gain over uniform."
        )
    if not rivals:
        return f"'{best.name}' ships with KL {kl:.4g} nats per token; no uniform format fits the budget."
    rival = min(rivals, key=lambda a: float(scores[a.name].kl.mean()))
    rival_kl = float(scores[rival.name].kl.mean())
    _, low, high = mean_interval(scores[rival.name].kl - scores[best.name].kl)
    ratio = f" ({kl / rival_kl:.2f} times)" if rival_kl > 0 else ""
    certainty = "the interval excludes no gain" if low > 0 else "the interval includes no gain"
    return (
        f"On selection text '{best.name}' measured KL {kl:.4g} nats per token against {rival_kl:.4g} of "
        f"'{rival.name}', the best uniform format in the budget{ratio}; gain {rival_kl - kl:.4g}, "
        f"95 % {low:.4g} to {high:.4g}: {certainty}."
    )


def make_evaluation(
    profile: SensitivityProfile,
    assignment: Assignment | None,
    scores: SequenceScores,
    tokens: np.ndarray,
    memory: CostTable,
    *,
    shipped: bool = False,
) -> Evaluation:
    """Returns the evaluation of an assignment, or of the reference when it is None."""
    kl, kl_low, kl_high = mean_interval(scores.kl)
    nll, nll_low, nll_high = mean_interval(scores.nll)
    if assignment is None:
        name, kind, memory_bytes, predicted = REFERENCE, REFERENCE, profile.reference_bytes, None
        stored_bits = _reference_bits(profile)
    else:
        name, kind = assignment.name, assignment.kind
        memory_bytes = round(float(pick(memory.cost, assignment.choice).sum()) + memory.fixed)
        predicted = predicted_kl(profile, assignment)[0]
        stored_bits = bits_per_weight(profile, memory_bytes - cache_use(profile.candidates, assignment.choice, memory))
    return Evaluation(
        name=name,
        kind=kind,
        memory_bytes=memory_bytes,
        bits_per_weight=stored_bits,
        predicted_kl=predicted,
        kl=kl,
        kl_low=max(kl_low, 0.0),
        kl_high=kl_high,
        perplexity=float(np.exp(nll)),
        perplexity_low=float(np.exp(nll_low)),
        perplexity_high=float(np.exp(nll_high)),
        tokens=int(tokens.size),
        shipped=shipped,
    )


def _reference_bits(profile: SensitivityProfile) -> float:
    if is_transformed(profile):
        # The profile's units and rest are those of the rewritten model.
        return float(profile.provenance["reference_bits_per_weight"])
    # It has no packed file's header; the rest is in both.
    file_bytes = profile.reference_bytes - reference_cache_bytes(profile)
    return 8.0 * (file_bytes - profile.rest_bytes) / count_weights(profile.candidates.units)
