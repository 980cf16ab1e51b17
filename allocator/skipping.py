"""Experts that tokens skip at run time: found on calibration text, and what it does on text that nothing else saw.

Skipping changes the function of the model, so what counts is the divergence from the model as it was trained, with full
routing: that of the plan alone, and that of the plan with experts skipped.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allocator.artefact_match import ArtefactMismatch, check_same_model
from allocator.artefacts import Model, open_model, profile_of_plan
from allocator.plans import Plan
from allocator.prefixes import compute_log_probabilities
from allocator.progress import Progress, silent
from allocator.renderings import rendering_of_plan
from allocator.store import Store
from runtime.apply import simulated_formats
from runtime.expert_skipping import ExpertSkipping, VisitCount, load_skipping, skip_everywhere, skipped_experts
from runtime.packed_model import find_source
from runtime.simulated_activations import simulated_activations
from sensitivity.evaluation import mean_interval
from sensitivity.experts.skip_calibration import PROTECTED_SHARE, calibrate_skipping

_GROUP_SEQUENCES = 8  # whose logits are in memory together


@dataclass(frozen=True, kw_only=True)
class SkippingScore:
    """What one model scored on evaluation text.

    Args:
        name: Its name.
        kl: Mean KL divergence to the model as it was trained, nats per token, with ``kl_low`` and ``kl_high``, its 95 %
            interval.
        skipped_share: Share of the visits of experts that were not made.
    """

    name: str
    kl: float
    kl_low: float
    kl_high: float
    skipped_share: float


@dataclass(frozen=True, kw_only=True)
class SkippingFound:
    """Below which weights experts are skipped, and what that does.

    Args:
        skipping: The numbers.
        scores: Evaluation: the plan, the plan with experts skipped, the unquantized model with experts skipped.
    """

    skipping: ExpertSkipping
    scores: Sequence[SkippingScore]


def find_skipping(
    model: str | Model,
    plan: Plan,
    *,
    quantile: float = 0.5,
    protected_share: float = PROTECTED_SHARE,
    store: Store | None = None,
    progress: Progress = silent,
) -> SkippingFound:
    """Returns below which weights the experts of a planned mixture are skipped, with what that does.

    Args:
        model: The model the plan was made for.
        plan: The plan.
        quantile: About the share of tokens that skip their second expert.
        protected_share: Share of tokens that keep all of their experts.
        store: Where the plan's profile is kept.
        progress: Called with (stage, done, total).

    Raises:
        ArtefactMismatch: If the plan was made for another model, or under other transforms than those stored.
        ValueError: If the plan's profile is not stored, a share is not from 0 to 1, or the model is no mixture with at
            least two experts a token.
    """
    store, model = store or Store(), open_model(model)
    check_same_model(plan, model.fingerprint, str(model.path))
    profile = profile_of_plan(plan, model, store, progress)
    reference = model.reference_of(plan, store)
    skipping = calibrate_skipping(
        reference.model,
        torch.from_numpy(profile.calibration_tokens),
        quantile=quantile,
        protected_share=protected_share,
        weights_fingerprint=reference.weights_fingerprint,
    )
    rendering = rendering_of_plan(plan, reference.model, store)
    scheme = {} if plan.activations is None else plan.activations.scheme
    planned = (
        lambda: simulated_formats(reference.model, plan.weights, quantizer=rendering),
        lambda: simulated_activations(reference.model, scheme),
    )
    ways = {
        "plan": (planned, None),
        "plan, experts skipped": (planned, skipping),
        "reference, experts skipped": ((), skipping),
    }
    tokens = torch.from_numpy(profile.evaluation_tokens)
    scores = []
    for i, (name, (contexts, rule)) in enumerate(ways.items()):
        progress("skipping", i, len(ways))
        scores.append(_score(name, reference.model, tokens, contexts, rule))
    progress("skipping", len(ways), len(ways))
    return SkippingFound(skipping=skipping, scores=tuple(scores))


def open_skipping(model: Any, value: str) -> ExpertSkipping:
    """Returns which experts are skipped, from a ratio for all layers or the file of ``bitplan skip-experts``.

    Args:
        model: A mixture of experts.
        value: A number from 0 to 1, or a path.

    Raises:
        ValueError: If it is neither, or the model has no experts.
        ArtefactMismatch: If the file is of another model, or of other transforms, than the packed one was made from.
    """
    try:
        ratio = float(value)
    except ValueError:
        found, source = load_skipping(Path(value)), find_source(model)
        if source and found.weights_fingerprint not in ("", source):
            msg = (
                f"experts must be skipped by numbers of the model and the transforms that were packed: got '{value}' "
                f"of {found.weights_fingerprint[:12]}, and a model made from {source[:12]}. Find them for this plan."
            )
            raise ArtefactMismatch(msg) from None
        return found
    return skip_everywhere(model, ratio)


def _score(
    name: str, model: Any, tokens: Tensor, contexts: Sequence[Any], rule: ExpertSkipping | None
) -> SkippingScore:
    divergences: list[Tensor] = []
    count = VisitCount()
    for batch in torch.split(tokens, _GROUP_SEQUENCES):
        before = compute_log_probabilities(model, batch, None)
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            made = None if rule is None else stack.enter_context(skipped_experts(model, rule))
            after = compute_log_probabilities(model, batch, None)
        if made is not None:
            count = VisitCount(routed=count.routed + made.routed, made=count.made + made.made)
        divergences.append((before.exp() * (before - after)).sum(-1).double().mean(-1))
    mean, low, high = mean_interval(np.asarray(torch.cat(divergences)))
    return SkippingScore(name=name, kl=mean, kl_low=max(low, 0.0), kl_high=high, skipped_share=count.skipped_share)
