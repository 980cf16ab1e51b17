"""Losses of quantized caches: the measured KL of each cache unit and format, and profiles with both kinds of units.

The keys, or the values, of one layer are quantized at a time, with the tokens of the text past to each other as in
decoding (``runtime.cached_attention``), and the model is run from that layer on. Every pair costs one suffix pass.

Limits: the text is as long as the Fisher sketch's sequences. Longer contexts average the errors of values over more
tokens and offer those of keys more tokens to mislead; only the bytes of a budget know its context.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.cache_formats import CacheLoad
from runtime.cached_attention import simulated_cache
from runtime.candidates import Candidates
from sensitivity.estimators import find_estimator
from sensitivity.joined_candidates import JoinedCandidates
from sensitivity.measure_config import FISHER, SINGLE_UNIT_KL
from sensitivity.pieces import Piece, read_or_measure
from sensitivity.profile import NATS, CacheLosses, LossTable, SensitivityProfile, fingerprint_of
from sensitivity.sketches.joint_kl import kl_by_position
from sensitivity.streaming.suffix import SuffixRunner

# Raised whenever a change makes the same inputs give other numbers.
CACHE_VERSION = 2
# Of the Fisher sketch's text.
CACHE_SEQUENCES = 2
_KL_METRICS = (FISHER, SINGLE_UNIT_KL)
_REFERENCE_BYTES = 2  # of a number in an unquantized cache


def check_metrics_beside_weights(metrics: Sequence[str], what: str) -> None:
    """Checks that some metric's losses add up with those of caches or activations.

    Args:
        metrics: Names of metrics.
        what: What is measured beside the weights, for the message.

    Raises:
        ValueError: If none is in nats per token.
    """
    if not any(metric in _KL_METRICS or find_estimator(metric).unit_of_measure == NATS for metric in metrics):
        msg = (
            f"losses of {what} are in {NATS} and need a metric of weights that is too: got metrics "
            f"{', '.join(metrics)}. Add '{FISHER}' or '{SINGLE_UNIT_KL}', or leave the formats of {what} out."
        )
        raise ValueError(msg)


def cache_fingerprint(weights_fingerprint: str, candidates: Candidates) -> str:
    """Returns the hash of what a profile of weights and caches depends on.

    Args:
        weights_fingerprint: That of the profile of the weights, which stands for the model and the text as well.
        candidates: Cache units and formats.
    """
    return fingerprint_of(
        {
            "version": CACHE_VERSION,
            "weights": weights_fingerprint,
            "units": [unit.name for unit in candidates.units],
            "formats": [f.name for f in candidates.formats],
            "allowed": candidates.allowed.astype(int).tolist(),
        }
    )


def measure_cache_losses(
    model: Any, candidates: Candidates, tokens: Tensor, *, pieces: Path, progress: Callable[[int, int], None]
) -> CacheLosses:
    """Returns the KL of each allowed pair in nats per token, with the standard error over the sequences.

    Args:
        model: The reference model in float32.
        candidates: Cache units and formats.
        tokens: [S, T] int64, run in one batch.
        pieces: Directory for the finished units; those already there are used.
        progress: Called with (units done, units in all).
    """
    measurer: _CacheMeasurer | None = None

    def measure(u: int) -> Piece:
        nonlocal measurer
        # Not before it is needed: it runs the model.
        measurer = measurer or _CacheMeasurer(model, candidates, tokens)
        return {"kl": measurer.measure(u)}

    count = len(candidates.units)
    progress(0, count)
    kl = np.zeros((*candidates.allowed.shape, tokens.shape[0]))
    for u in range(count):
        kl[u] = read_or_measure(pieces / f"{u:05d}.safetensors", partial(measure, u))["kl"]
        progress(u + 1, count)
    std_error = kl.std(axis=-1, ddof=1) / np.sqrt(tokens.shape[0])
    table = LossTable(loss=kl.mean(axis=-1), std_error=std_error, unit_of_measure=NATS)
    return CacheLosses(candidates=candidates, table=table)


def join_cache(profile: SensitivityProfile, *, context: int, batch: int) -> SensitivityProfile:
    """Returns a profile whose candidates are the weights and, after them, the caches.

    Every metric in nats per token says the measured KL of a cache. The other metrics have no meaning on caches, and
    are NaN there; there are no cross terms of caches either: what is kept of them is zero. The corrections of
    predictions were fitted to plans of weights, and go with the sum.

    Args:
        profile: As it was measured.
        context: Tokens that each sequence keeps.
        batch: Sequences.

    Raises:
        ValueError: If no caches were measured.
    """
    cache = profile.cache
    if cache is None:
        msg = (
            f"a budget with a context needs the losses of caches: got context={context} and a profile without them. "
            "Measure with cache formats (--cache-formats int8_channel,int4_channel,bf16)."
        )
        raise ValueError(msg)
    both = JoinedCandidates(profile.candidates, cache.candidates, words=("weights", "caches"))
    joined = replace(
        profile,
        candidates=both.candidates,
        losses={metric: both.join(table, cache.table) for metric, table in profile.losses.items()},
        fisher_sketch=None if profile.fisher_sketch is None else both.pad_sketch(profile.fisher_sketch),
        logit_gram=None if profile.logit_gram is None else both.pad_gram(profile.logit_gram),
        cache_load=CacheLoad(context=context, batch=batch),
    )
    return replace(joined, reference_bytes=profile.reference_bytes + reference_cache_bytes(joined))


def reference_cache_bytes(profile: SensitivityProfile) -> int:
    """Returns the bytes of the unquantized cache, 16 bits a number, of a profile; 0 where it holds none."""
    if profile.cache_load is None:
        return 0
    shapes = [unit.cache_shape for unit in profile.candidates.units if unit.cache_shape is not None]
    return _REFERENCE_BYTES * profile.cache_load.token_count * sum(heads * head_dim for heads, head_dim in shapes)


class _CacheMeasurer:
    """Measures cache units one by one on fixed tokens."""

    def __init__(self, model: Any, candidates: Candidates, tokens: Tensor) -> None:
        self._model = model
        self._candidates = candidates
        self._sequences = tokens.shape[0]
        self._runner = SuffixRunner(model, tokens)
        self._log_p = torch.log_softmax(self._runner.reference_logits.flatten(0, 1), dim=-1)
        self._p = self._log_p.exp()

    def measure(self, u: int) -> NDArray[np.float64]:
        """Returns [F, S], zero for formats not allowed."""
        unit = self._candidates.units[u]
        kl = np.zeros((len(self._candidates.formats), self._sequences))
        for f in np.flatnonzero(self._candidates.allowed[u]):
            with simulated_cache(self._model, {unit.name: self._candidates.formats[f].name}):
                logits = self._runner.logits(unit.layer_index).flatten(0, 1)
            by_position = kl_by_position(self._log_p, self._p, logits).double()
            kl[f] = by_position.view(self._sequences, -1).mean(dim=1).numpy()
        return kl
