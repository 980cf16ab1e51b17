"""Prefix tokens for a plan: searched on calibration text, measured on text that nothing else saw, shipped if asked for.

A prefix changes the function of the model, so what counts is the divergence of the plan behind the prefix from the
model as it was trained, without any. The search lowers that, and finds no prefix where none does.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allocator.artefact_match import ArtefactMismatch, check_same_model
from allocator.artefacts import Model, open_model, profile_of_plan
from allocator.plans import Plan
from allocator.progress import Progress, silent
from allocator.renderings import rendering_of_plan
from allocator.store import Store
from runtime.apply import simulated_formats
from runtime.loading import ReferenceModel
from runtime.rendering import RenderingRule
from runtime.simulated_activations import simulated_activations
from runtime.transforms.prefix_tokens import (
    Prefix,
    compute_prefixed_logits,
    list_prefix_candidates,
    load_prefix,
    make_prefix,
    search_prefix,
)
from sensitivity.evaluation import SequenceScores, mean_interval

_SEARCH_SEQUENCES, _SEARCH_TOKENS = 4, 128
_GROUP_TOKENS = 512  # whose logits are in memory together
_PLAN, _PREFIXED, _UNQUANTIZED = "plan", "plan behind the prefix", "reference behind the prefix"


@dataclass(frozen=True, kw_only=True)
class PrefixScore:
    """What one model with or without a prefix scored on evaluation text.

    Args:
        name: Its name.
        kl: Mean KL divergence to the model as it was trained, without a prefix, nats per token, with ``kl_low`` and
            ``kl_high``, its 95 % interval.
        perplexity: exp of the mean negative log-likelihood of the text.
    """

    name: str
    kl: float
    kl_low: float
    kl_high: float
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class PrefixFound:
    """The outcome of a search.

    Args:
        prefix: The prefix, or None where no candidate helped.
        text: Its tokens as text.
        search_kl: KL on the search's text without a prefix, and after each token.
        scores: Evaluation: the plan, the plan behind the prefix, the unquantized model behind it.
        verdict: What the evaluation found, in one sentence.
        prefix_bytes: Bytes of keys and values, which come on top of the weight file.
    """

    prefix: Prefix | None
    text: str
    search_kl: Sequence[float]
    scores: Sequence[PrefixScore] = field(default_factory=tuple)
    verdict: str = "No candidate lowers the divergence on calibration text: no prefix."
    prefix_bytes: int = 0


def find_prefix(
    model: str | Model,
    plan: Plan,
    *,
    length: int = 3,
    candidates: int = 12,
    store: Store | None = None,
    progress: Progress = silent,
) -> PrefixFound:
    """Returns the prefix that lowers a plan's divergence most, with what it does on evaluation text.

    Args:
        model: The model the plan was made for.
        plan: The plan.
        length: The most tokens.
        candidates: Tokens tried at every place.
        store: Where the plan's profile is kept.
        progress: Called with (stage, done, total).

    Raises:
        ArtefactMismatch: If the plan was made for another model, or under other transforms than those stored.
        ValueError: If the plan's profile is not stored, or the model is no decoder that transforms know.
    """
    store, model = store or Store(), open_model(model)
    check_same_model(plan, model.fingerprint, str(model.path))
    profile = profile_of_plan(plan, model, store, progress)
    reference = model.reference_of(plan, store)
    rule = rendering_of_plan(plan, reference.model, store)
    seen = torch.from_numpy(profile.calibration_tokens)[:_SEARCH_SEQUENCES, :_SEARCH_TOKENS]
    tried = list_prefix_candidates(reference.model, seen, first=reference.tokenizer.bos_token_id, count=candidates)
    chosen, left = _search(reference, plan, rule, seen, tried, length=length, progress=progress)
    prefix = _make(reference, chosen)
    if prefix is None:
        return PrefixFound(prefix=None, text="", search_kl=left)
    return _evaluate(reference, plan, rule, prefix, torch.from_numpy(profile.evaluation_tokens), search_kl=left)


def check_prefix(path: Path, reference: ReferenceModel, plan: Plan) -> Prefix:
    """Returns the prefix in a file, made for a reference model.

    Raises:
        ValueError: If the file is missing or damaged, or the plan has formats for the cache.
        ArtefactMismatch: If it was made for another model, or under other transforms.
    """
    if plan.cache is not None:
        msg = (
            f"prefix tokens ship with keys and values as they are: got '{path}' and a plan with formats for the cache. "
            "Leave the prefix out, or plan without --context."
        )
        raise ValueError(msg)
    prefix = load_prefix(path)
    if prefix.weights_fingerprint != reference.weights_fingerprint:
        msg = (
            f"a prefix must be used with the model and the transforms it was made under: got '{path}' of "
            f"{prefix.weights_fingerprint[:12]}, and '{reference.name}' of {reference.weights_fingerprint[:12]}. "
            "Find a prefix for this plan."
        )
        raise ArtefactMismatch(msg)
    return prefix


def _make(reference: ReferenceModel, tokens: Sequence[int]) -> Prefix | None:
    if not tokens:
        return None
    return make_prefix(reference.model, tokens, weights_fingerprint=reference.weights_fingerprint)


def _search(
    reference: ReferenceModel,
    plan: Plan,
    rule: RenderingRule,
    seen: Tensor,
    candidates: Sequence[int],
    *,
    length: int,
    progress: Progress,
) -> tuple[list[int], list[float]]:
    """Returns the tokens found and the KL before and after each; the plan is rendered once for each place."""
    before = compute_log_probabilities(reference.model, seen, None)
    places = 0

    def measure(prefixes: Sequence[Sequence[int]]) -> list[float]:
        nonlocal places
        progress("prefix", places, 1 + length)
        # Keys and values are the unquantized model's.
        made = [_make(reference, tokens) for tokens in prefixes]
        with _simulated(reference.model, plan, rule):
            found = [_divergence(before, compute_log_probabilities(reference.model, seen, p)).mean() for p in made]
        places += 1
        return [float(kl) for kl in found]

    chosen, left = search_prefix(candidates, length=length, measure=measure)
    progress("prefix", 1 + length, 1 + length)
    return chosen, left


def _evaluate(
    reference: ReferenceModel,
    plan: Plan,
    rule: RenderingRule,
    prefix: Prefix,
    tokens: Tensor,
    *,
    search_kl: list[float],
) -> PrefixFound:
    scored = _score_sequences(reference.model, plan, rule, prefix, tokens)
    gain, low, high = mean_interval(scored[_PLAN].kl - scored[_PREFIXED].kl)
    certainty = "the interval excludes no gain" if low > 0 else "the interval includes no gain"
    return PrefixFound(
        prefix=prefix,
        text=str(reference.tokenizer.decode(prefix.tokens)),
        search_kl=search_kl,
        scores=tuple(_make_score(name, score) for name, score in scored.items()),
        verdict=(
            f"On evaluation text the prefix lowers KL by {gain:.4g} nats per token, 95 % {low:.4g} to {high:.4g}: "
            f"{certainty}."
        ),
        prefix_bytes=prefix.stored_bytes,
    )


def _score_sequences(
    model: Any, plan: Plan, rule: RenderingRule, prefix: Prefix, tokens: Tensor
) -> dict[str, SequenceScores]:
    """Returns name -> what each sequence scored, a few sequences at a time."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {_PLAN: [], _PREFIXED: [], _UNQUANTIZED: []}
    for batch in torch.split(tokens, max(1, _GROUP_TOKENS // tokens.shape[1])):
        before = compute_log_probabilities(model, batch, None)

        def add(name: str, prefix: Prefix | None, batch: Tensor = batch, before: Tensor = before) -> None:
            after = compute_log_probabilities(model, batch, prefix)
            nll = -after[:, :-1].gather(-1, batch[:, 1:, None])[..., 0].double().mean(dim=-1)
            parts[name].append((_divergence(before, after), nll))

        add(_UNQUANTIZED, prefix)
        with _simulated(model, plan, rule):
            add(_PLAN, None)
            add(_PREFIXED, prefix)
    return {
        name: SequenceScores(
            kl=torch.cat([kl for kl, _ in pairs]).numpy(), nll=torch.cat([nll for _, nll in pairs]).numpy()
        )
        for name, pairs in parts.items()
    }


def _make_score(name: str, score: SequenceScores) -> PrefixScore:
    mean, low, high = mean_interval(score.kl)
    return PrefixScore(
        name=name, kl=mean, kl_low=max(low, 0.0), kl_high=high, perplexity=float(np.exp(score.nll.mean()))
    )


@torch.no_grad()
def compute_log_probabilities(model: Any, tokens: Tensor, prefix: Prefix | None) -> Tensor:
    """Returns the log-probabilities [S, T, V] in float32 of text behind a prefix, or of the text alone."""
    return torch.log_softmax(compute_prefixed_logits(model, tokens, prefix).float(), dim=-1)


def _divergence(before: Tensor, after: Tensor) -> Tensor:
    """Returns the KL [S] in nats per token, of log-probabilities [S, T, V]."""
    pairs = zip(before, after, strict=True)
    return torch.stack([(p.exp() * (p - q)).sum(-1).double().mean() for p, q in pairs])


@contextmanager
def _simulated(model: Any, plan: Plan, rule: RenderingRule) -> Iterator[None]:
    """Gives the model the weights of a plan, and the formats of its activations where it has any."""
    scheme = {} if plan.activations is None else plan.activations.scheme
    with simulated_formats(model, plan.weights, quantizer=rule), simulated_activations(model, scheme):
        yield
