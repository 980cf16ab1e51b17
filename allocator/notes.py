"""What a report says in words: how far predictions can be trusted, and what a mixture of experts does."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.stats import spearmanr

from allocator.planning import default_metric
from allocator.plans import Evaluation, Plan
from allocator.transformed import is_transformed
from runtime.cached_attention import KEY_CACHE, VALUE_CACHE
from sensitivity.experts.shrinkage import LEAST_TOKENS
from sensitivity.profile import SensitivityProfile
from sensitivity.sketches.fisher_sketch import fisher_loss

_MOST_NAMED = 12


def list_notes(profile: SensitivityProfile, plan: Plan, evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
    """Returns the notes of a report, one sentence or two each.

    Args:
        profile: The profile the plan was made from.
        plan: The plan.
        evaluations: Measurements on evaluation text; the plan's is the shipped one.
    """
    shipped = next(e for e in evaluations if e.shipped)
    return tuple(
        [
            *_transform_notes(plan),
            *_cache_notes(plan),
            *([f"Latency: {plan.latency_text}."] if plan.latency_text else []),
            *([f"{plan.activations.describe().capitalize()}."] if plan.activations else []),
            *_prediction_notes(profile, plan, shipped),
            *_stability_notes(profile),
            *_expert_notes(profile),
            *([plan.rules.describe()] if plan.rules else []),
        ]
    )


def _transform_notes(plan: Plan) -> Iterator[str]:
    if not is_transformed(plan):
        return
    added = int(plan.provenance["transforms_added_weights"])
    total = sum(unit.weights for unit in plan.units)
    yield (
        f"The reference was rewritten before it was measured, its function unchanged: {plan.provenance['transforms']}. "
        f"The plan's weights are {total}, {added} of them ({added / total:.2%}) added by that; they count in its bytes "
        "and in its bits per weight. The reference's bytes are those before."
    )


def _prediction_notes(profile: SensitivityProfile, plan: Plan, shipped: Evaluation) -> Iterator[str]:
    seen = f"measures {shipped.kl:.4g} nats per token on {shipped.tokens} tokens that nothing else saw."
    ratio = f" ({shipped.kl / plan.predicted_kl:.2f} times)" if plan.predicted_kl > 0 else ""
    if math.isnan(plan.predicted_kl):
        yield f"The finished plan {seen}"
    else:
        yield f"Additivity: the units' losses sum to {plan.predicted_kl:.4g} and the finished plan{ratio} {seen}"
    yield f"Losses are those of the metric '{plan.metric}'; the profile's best is '{default_metric(profile)}'."
    if plan.corrected_kl and plan.correction_error is not None:
        yield (
            "Calibration of the prediction: corrected by whole plans measured on calibration text it is "
            f"{plan.corrected_kl:.4g}; two of three such plans measured within a factor of {plan.correction_error:.3g} "
            f"of theirs. Here measured over corrected is {shipped.kl / plan.corrected_kl:.3g}."
        )
    else:
        yield "Calibration of the prediction: no whole plans were measured to correct it by."
    if plan.predicted_kl_with_interactions is not None:
        yield f"With measured cross terms the prediction is {plan.predicted_kl_with_interactions:.4g}."


def _cache_notes(plan: Plan) -> Iterator[str]:
    cache = plan.cache
    if cache is None:
        return
    halves = []
    for half, role in (("keys", KEY_CACHE), ("values", VALUE_CACHE)):
        units = [unit for unit in plan.units if unit.role == role]
        counts = Counter(unit.format for unit in units).most_common()
        stored = sum(unit.memory_bytes for unit in units) / 2**20
        halves.append(f"{half} {stored:.2f} MiB ({', '.join(f'{name} x {count}' for name, count in counts)})")
    yield (
        f"Memory: {plan.file_bytes / 2**20:.2f} MiB of weights and {cache.memory_bytes / 2**20:.2f} MiB of cache at "
        f"{cache.context} tokens and batch {cache.batch}: {', '.join(halves)}. The context prices bytes alone: KL is "
        "measured on the text's own, shorter sequences, every token of them decoded from the quantized cache."
    )


def _stability_notes(profile: SensitivityProfile) -> Iterator[str]:
    sketch = profile.fisher_sketch
    if sketch is None or len(sketch) < 4 or len(profile.candidates.units) < 3:
        return
    halves = [fisher_loss(sketch[part::2])[0] for part in (0, 1)]
    correlations = []
    for f in range(len(profile.candidates.formats)):
        units = profile.candidates.allowed[:, f] & (halves[0][:, f] > 0) & (halves[1][:, f] > 0)
        if units.sum() >= 3:
            correlations.append(float(spearmanr(halves[0][units, f], halves[1][units, f]).statistic))
    if correlations:
        yield (
            "Stability: the two halves of the calibration text rank the units of one format with a Spearman "
            f"correlation of {np.mean(correlations):.3f} on average, {min(correlations):.3f} at least (Fisher sketch)."
        )


def _expert_notes(profile: SensitivityProfile) -> Iterator[str]:
    routing = profile.routing
    if routing is None:
        return
    tokens = int(routing.tokens.sum())
    shares = ", ".join(f"{spread:.3f}" for spread in routing.usage_spread)
    yield f"Experts: usage spread by layer on {tokens} calibration tokens {shares} (0 is even use)."
    rare = routing.rare_experts(LEAST_TOKENS)
    if rare:
        named = ", ".join(f"layer {layer} expert {e} ({n})" for (layer, e), n in list(rare.items())[:_MOST_NAMED])
        more = f" and {len(rare) - _MOST_NAMED} more" if len(rare) > _MOST_NAMED else ""
        yield (
            f"Coverage: {len(rare)} experts were taken by fewer than {LEAST_TOKENS} calibration tokens; their losses "
            f"are mostly their layer's: {named}{more}. More calibration text would tell."
        )
